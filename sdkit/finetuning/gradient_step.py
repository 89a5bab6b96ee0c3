"""One optimiser step: forward and backward in micro-batches, the sum over processes, the update."""

# B effective batch

import torch

from sdkit.finetuning.batches import Batch
from sdkit.finetuning.gates import measure_norm
from sdkit.finetuning.training_run import TrainingRun
from sdkit.validation import is_finite


def compute_gradients(run: TrainingRun, batch: Batch, loss_scale=1.0):
    """Fills the parameters' gradients with those of the mean loss over the effective batch.

    Args:
        run: The training.
        batch: This process's samples, on the CPU.
        loss_scale: What the loss is multiplied with; gradients stay multiplied.

    Returns:
        (loss, length of the gradients, gate), where the gate is "batch", "loss" or "gradients" if
        something was not finite there, else None; the same in all processes.
    """
    run.optimizer.zero_grad(set_to_none=True)
    total = torch.zeros((), device=run.device)
    is_bad = not all(map(is_finite, batch.tensors.values()))
    if not is_bad:
        for part in batch.to(run.device).split(run.micro_batch.size):
            loss = run.measure_share(part)
            (loss * loss_scale).backward()
            total += loss.detach()
    total, is_bad = _sum_over_processes(run, total, is_bad)
    if is_bad:
        return None, None, "batch"
    norm = measure_norm([p.grad for p in run.parameters]) / loss_scale
    loss = float(total)
    if not is_finite(total):
        return loss, norm, "loss"
    return loss, norm, None if norm < float("inf") else "gradients"  # NaN is not below it either


def _sum_over_processes(run, total, is_bad):
    """Adds up gradients, loss and whether a batch was bad: one call, for an adapter is small."""
    if run.accelerator.num_processes == 1:
        return total, is_bad
    for parameter in run.parameters:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
    flags = torch.stack([total, torch.full_like(total, float(is_bad))])
    flat = torch.cat([*(p.grad.flatten() for p in run.parameters), flags])
    flat = run.accelerator.reduce(flat, "sum")
    sizes = [*(p.numel() for p in run.parameters), 2]
    *gradients, flags = flat.split(sizes)
    for parameter, gradient in zip(run.parameters, gradients, strict=True):
        parameter.grad = gradient.view_as(parameter)
    return flags[0], bool(flags[1] > 0)


def take_step(run: TrainingRun, learning_rate, norm, loss_scale=1.0):
    """Clips the gradients and updates the weights.

    Args:
        run: The training, with finite gradients.
        learning_rate: Of this step.
        norm: Length of the gradients, loss scale taken out.
        loss_scale: What they are multiplied with.

    Returns:
        "weights" if a weight or a moment is not finite afterwards, else None.
    """
    longest = run.config.max_grad_norm
    shrink = 1.0 if longest is None else min(1.0, longest / (norm + 1e-6))  # as torch clips
    if shrink != loss_scale:
        torch._foreach_mul_([p.grad for p in run.parameters], shrink / loss_scale)
    for group in run.optimizer.param_groups:
        group["lr"] = learning_rate
    run.optimizer.step()
    moments = [
        value
        for state in run.optimizer.state.values()
        for value in state.values()
        if isinstance(value, torch.Tensor) and value.is_floating_point()
    ]
    is_sound = measure_norm([*run.parameters, *moments]) < float("inf")
    return None if is_sound else "weights"

"""Finite gates: no NaN and no Inf reaches the weights or the disk, and who made it is named."""

# B batch

from dataclasses import dataclass

import torch

from sdkit.diagnosis.training_step import diagnose_training_step
from sdkit.validation import ValidationError, count_nonfinite, is_finite


@dataclass(frozen=True)
class DroppedStep:
    """A step that was not taken.

    Attributes:
        step: From 0.
        gate: Where it was stopped: "batch", "loss", "gradients", "weights" or "validation".
        images: Names of the images at fault; empty if it is none of them alone.
        cause: In a few words, as `sdkit diagnose` has it: "range-overflow" and the like.
        message: One sentence for people.
    """

    step: int
    gate: str
    images: tuple
    cause: str
    message: str

    def __str__(self):
        """One line."""
        return f"step {self.step + 1} dropped at the {self.gate} gate: {self.message}"


def find_bad_samples(batch) -> dict:
    """Returns {position: which of its tensors is bad, and how} of a batch that has bad numbers."""
    found = {}
    for name, tensor in batch.tensors.items():
        if is_finite(tensor):
            continue
        for row, values in enumerate(tensor):
            nan_count, inf_count = count_nonfinite(values)
            if nan_count or inf_count:
                found[batch.positions[row]] = (
                    f"{nan_count} NaN and {inf_count} Inf of {values.numel()} values in its {name}"
                )
    return found


def measure_norm(gradients) -> float:
    """Returns the length of all gradients together: not finite if any value of them is not."""
    return float(torch.nn.utils.get_total_norm(gradients, foreach=None))


def find_guilty(batch, measure_loss, parameters) -> tuple:
    """Runs each sample of a bad batch alone, forward and backward.

    The draws of a sample are its own, so alone it meets what it met in the batch. Gradients are
    left as they were.

    Args:
        batch: A Batch on the device.
        measure_loss: Function of a Batch that returns its scalar loss.
        parameters: What is trained.

    Returns:
        Positions whose loss or gradients are not finite: all of them if the fault is the model's.
    """
    guilty = []
    for sample in batch.split(1):
        loss = measure_loss(sample)
        gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
        gradients = [gradient for gradient in gradients if gradient is not None]
        if not (is_finite(loss) and all(map(is_finite, gradients))):
            guilty.append(sample.positions[0])
    return tuple(guilty)


def explain(batch, guilty, measure_loss, components) -> tuple:
    """Names the cause of a bad step, by the trace of forward and backward of one guilty sample.

    Args:
        batch: A Batch on the device.
        guilty: What `find_guilty` returned.
        measure_loss: As there.
        components: {name: module} of what computes the loss.

    Returns:
        The cause in a few words, and a sentence.
    """
    if not guilty:
        return "not-repeatable", (
            f"the fault did not come back when {', '.join(batch.names)} were run one by one"
        )
    sample = next(s for s in batch.split(1) if s.positions[0] == guilty[0])
    diagnosis = diagnose_training_step(lambda: measure_loss(sample), components)
    if diagnosis.is_healthy:
        return "not-repeatable", f"{sample.names[0]} was bad alone, but not under the trace"
    who = (
        f"each of {len(batch)} images alone is bad, so the fault is the model's"
        if len(guilty) == len(batch) > 1
        else ", ".join(name_images(batch, guilty))
    )
    return diagnosis.cause, (
        f"{who}; first bad op {diagnosis.op} in {diagnosis.module}, "
        f"{diagnosis.evidence.get('pass', 'forward')} pass ({diagnosis.cause})"
    )


def name_images(batch, positions) -> tuple:
    """Names of the images at these positions, each once."""
    at = dict(zip(batch.positions, batch.names, strict=True))
    return tuple(dict.fromkeys(at[position] for position in positions))


def check_state(state: dict, where: str):
    """Returns the adapter's weights, or the optimiser's state, unchanged.

    Args:
        state: {name: tensor}, or such dicts in a dict.
        where: What it is, for the message.

    Raises:
        ValidationError: A value is NaN or Inf; the message names the tensor.
    """
    for name, value in state.items():
        if isinstance(value, dict):
            check_state(value, f"{where}: {name}")
        elif isinstance(value, torch.Tensor) and not is_finite(value):
            nan_count, inf_count = count_nonfinite(value)
            raise ValidationError(
                f"{where}: {name} holds {nan_count} NaN and {inf_count} Inf. Expected finite "
                "values; nothing was written. Lower the learning rate."
            )
    return state

"""One resumable loop for both trainings of the bundled model: rate, EMA, log, checkpoints."""

import json
import math
import time
from collections.abc import Callable
from pathlib import Path

import torch
from diffusers.training_utils import EMAModel
from tqdm.auto import tqdm

from sdkit.run_folder import replace_file

CHECKPOINT_SECONDS = 120.0
WARMUP_STEPS = 100
LOG_STEPS = 25


def train(
    modules: dict[str, torch.nn.Module],
    measure_loss: Callable[[torch.Generator], torch.Tensor],
    *,
    steps: int,
    learning_rate: float,
    ema_decay: float,
    seed: int,
    device: torch.device,
    folder: Path,
    name: str,
) -> None:
    """Trains until `steps`, from the checkpoint in `folder`; the modules end with the EMA weights.

    Args:
        modules: Trained together; named for the checkpoint.
        measure_loss: Draws a batch with the given CPU generator and returns a scalar loss.
        steps: Optimiser steps in all.
        learning_rate: Peak of a cosine with linear warm-up.
        ema_decay: Of the averaged weights.
        seed: Of the batches: step k draws the same batch in a resumed run.
        device: Where the modules are; bfloat16 autocast is used on it.
        folder: For `<name>.pt` (state) and `<name>.jsonl` (log).
        name: Of the stage, in the progress bar too.
    """
    parameters = [p for module in modules.values() for p in module.parameters()]
    optimizer = torch.optim.AdamW(
        parameters, lr=learning_rate, betas=(0.9, 0.99), weight_decay=0.01, fused=True
    )
    ema = EMAModel(parameters, decay=ema_decay)
    state_path, log_path = folder / f"{name}.pt", folder / f"{name}.jsonl"
    done = load_state(state_path, modules, optimizer, ema) if state_path.exists() else 0
    ema.to(device)
    saved_at, losses = time.monotonic(), []
    progress = tqdm(range(done, steps), initial=done, total=steps, desc=name, mininterval=5)
    for step in progress:
        optimizer.param_groups[0]["lr"] = learning_rate * cosine(step, steps)
        with torch.autocast(device.type, torch.bfloat16):
            loss = measure_loss(torch.Generator().manual_seed(seed * 1_000_003 + step))
        if not torch.isfinite(loss):
            raise FloatingPointError(
                f"{name}: the loss is {loss.item()} at step {step}; state kept in {state_path.name}"
            )
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        ema.step(parameters)
        losses.append(loss.item())
        if (step + 1) % LOG_STEPS == 0 or step + 1 == steps:
            mean = sum(losses) / len(losses)
            progress.set_postfix(loss=f"{mean:.4f}")
            entry = {
                "step": step + 1,
                "loss": mean,
                "learning_rate": optimizer.param_groups[0]["lr"],
            }
            with log_path.open("a") as log:
                log.write(json.dumps(entry) + "\n")
            losses = []
        if time.monotonic() - saved_at > CHECKPOINT_SECONDS or step + 1 == steps:
            save_state(state_path, modules, optimizer, ema, step + 1)
            saved_at = time.monotonic()
    ema.copy_to(parameters)


def cosine(step: int, steps: int) -> float:
    """Linear warm-up, then half a cosine to zero."""
    if step < WARMUP_STEPS:
        return (step + 1) / WARMUP_STEPS
    return 0.5 * (1 + math.cos(math.pi * (step - WARMUP_STEPS) / max(1, steps - WARMUP_STEPS)))


def save_state(path: Path, modules, optimizer, ema, step: int) -> Path:
    """Writes the whole training state, atomically."""
    state = {
        "modules": {name: module.state_dict() for name, module in modules.items()},
        "optimizer": optimizer.state_dict(),
        "ema": ema.state_dict(),
        "step": step,
    }
    with replace_file(path) as temporary:
        torch.save(state, temporary)
    return path


def load_state(path: Path, modules, optimizer, ema) -> int:
    """Restores what `save_state` wrote and returns the steps done."""
    state = torch.load(path, weights_only=True, map_location="cpu")
    for name, module in modules.items():
        module.load_state_dict(state["modules"][name])
    optimizer.load_state_dict(state["optimizer"])
    ema.load_state_dict(state["ema"])
    return state["step"]

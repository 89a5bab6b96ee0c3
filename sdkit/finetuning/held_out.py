"""Looks at how far it is: the loss of held-out images, and pictures drawn on the way."""

from contextlib import contextmanager
from dataclasses import replace

import torch
from accelerate.utils import gather_object

from sdkit.finetuning.batches import draw_sample, gather_samples
from sdkit.finetuning.keyed_random import keyed_generator
from sdkit.finetuning.run_start import IMAGES_NAME
from sdkit.finetuning.training_run import TrainingRun
from sdkit.generation import generate


def measure_validation_loss(run: TrainingRun) -> float:
    """Returns the mean loss of the held-out images, always at the same timesteps and noises.

    Timesteps are spread evenly over the schedule, and no weighting is put on them, so that runs
    with different settings can be compared.
    """
    total = torch.zeros((), device=run.device)
    for _, losses in _measure_held_out(run):
        total += losses.sum()
    return float(run.accelerator.reduce(total, "sum")) / len(run.validation.names)


def find_bad_held_out(run: TrainingRun) -> tuple:
    """Returns the names of the held-out images whose loss is not finite."""
    bad = [
        run.validation.names[index]
        for indices, losses in _measure_held_out(run)
        for index, is_good in zip(indices, losses.isfinite().tolist(), strict=True)
        if not is_good
    ]
    return tuple(sorted(gather_object(bad)))


def _measure_held_out(run):
    """Yields (indices, their losses) of this process's share."""
    encoded, accelerator = run.validation, run.accelerator
    count = len(encoded.names)
    timestep_count = run.noise_scheduler.config.num_train_timesteps
    mine = range(count)[accelerator.process_index :: accelerator.num_processes]
    with _in_evaluation(run):
        for start in range(0, len(mine), run.micro_batch.size):
            indices = mine[start : start + run.micro_batch.size]
            samples = [
                draw_sample(
                    encoded, i, keyed_generator(run.config.seed, "validation", i), timestep_count
                )
                for i in indices
            ]
            timesteps = torch.tensor([(2 * i + 1) * timestep_count // (2 * count) for i in indices])
            batch = replace(gather_samples(encoded, indices, indices, samples), timesteps=timesteps)
            yield indices, run.measure_losses(batch.to(run.device))


def draw_pictures(run: TrainingRun, step) -> str | None:
    """Draws the validation prompts with the adapter as it is; a bad picture is recorded, not saved.

    Returns:
        The folder of the pictures and of their record, within the run's.
    """
    name, config = f"{IMAGES_NAME}/step_{step:08d}", run.config
    if run.accelerator.is_main_process:
        with _in_evaluation(run):
            generate(
                run.pipe, list(config.validation_prompts), seed=config.validation_seed,
                num_inference_steps=config.validation_inference_steps,
                guidance_scale=config.validation_guidance_scale,
                output_folder=run.folder / name, on_nonfinite="skip", progress=False,
            )  # fmt: skip
    run.accelerator.wait_for_everyone()
    return name


@contextmanager
def _in_evaluation(run):
    """Without gradients and without checkpointing; training mode comes back afterwards."""
    modules = (run.pipe.unet, run.pipe.text_encoder)
    modes = [module.training for module in modules]
    try:
        for module in modules:
            module.eval()
        with torch.no_grad():
            yield
    finally:
        for module, mode in zip(modules, modes, strict=True):
            module.train(mode)

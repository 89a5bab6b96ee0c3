"""The training loop: draw, add noise, predict, measure, step; and look at every number on the way.

    report = train_lora(LoRAConfig(dataset="photos", output_folder="runs/shoes"))

A step that is not finite is dropped before it touches the weights; the image at fault is named.
"""

import math
import time
from dataclasses import dataclass, replace

from tqdm.auto import tqdm

from sdkit.emulate import active as find_emulation
from sdkit.finetuning.batches import draw_batch
from sdkit.finetuning.checkpoints import explain_disk_errors
from sdkit.finetuning.config import LoRAConfig
from sdkit.finetuning.dropping import drop_step, go_back
from sdkit.finetuning.finishing import describe_run, finish, make_report
from sdkit.finetuning.gates import DroppedStep
from sdkit.finetuning.gradient_step import compute_gradients, take_step
from sdkit.finetuning.held_out import draw_pictures, measure_validation_loss
from sdkit.finetuning.interrupt import InterruptWatch
from sdkit.finetuning.keyed_random import keyed_dropout
from sdkit.finetuning.optimizer import learning_rate_at
from sdkit.finetuning.processes import any_process
from sdkit.finetuning.progress import Progress
from sdkit.finetuning.report import FINISHED, INTERRUPTED, TrainReport
from sdkit.finetuning.training_run import TrainingRun, begin_run, save
from sdkit.generation.caught_warnings import CaughtWarnings


@dataclass(frozen=True)
class TrainedStep:
    """What one step came to, for whoever watches.

    Attributes:
        step: From 0.
        loss: Mean over the effective batch; None if the step was dropped.
        learning_rate: Of this step.
        gradient_norm: Before clipping; None likewise.
        images_per_second: Since the run began, steps alone.
        validation_loss: After this step, if it was measured.
        dropped: The DroppedStep, or None.
    """

    step: int
    loss: float | None
    learning_rate: float
    gradient_norm: float | None
    images_per_second: float
    validation_loss: float | None
    dropped: DroppedStep | None


def train_lora(
    config: LoRAConfig,
    *,
    resume=False,
    overwrite=False,
    pipe=None,
    data=None,
    on_step=None,
    progress=True,
) -> TrainReport:
    """Trains a LoRA adapter; every number is looked at before it can do harm.

    Args:
        config: The settings.
        resume: Go on with the run in `config.output_folder`, from its last checkpoint: on the CPU
            the weights end bit for bit as without the interruption.
        overwrite: Remove the run that is there, and begin anew.
        pipe: A loaded pipeline to train instead of `config.model`; it is changed.
        data: (train, validation) EncodedDatasets instead of `config.dataset`; validation may be
            None.
        on_step: Called after each step with a TrainedStep, in the main process.
        progress: Whether to show what was chosen, and a progress bar.

    Returns:
        A TrainReport; also in `train_report.json`. A Ctrl-C ends the step, saves and returns.

    Raises:
        ValidationError: Before anything is trained: settings, data, device or folder are not fit;
            there is no run to resume, or its checkpoint is damaged. On the way: the disk refuses a
            checkpoint (the last good one stays).
    """
    with explain_disk_errors(config.output_folder):
        return _train(config, resume, overwrite, pipe, data, on_step, progress)


def _train(config, resume, overwrite, pipe, data, on_step, progress) -> TrainReport:
    started = time.perf_counter()
    caught = CaughtWarnings()
    try:
        with caught:
            run, position = begin_run(
                config, resume=resume, overwrite=overwrite, pipe=pipe, data=data, progress=progress
            )
            is_shown = progress and run.accelerator.is_main_process
            if is_shown:
                print(describe_run(run, position))
            with InterruptWatch() as interrupt:
                position, stopped, first = run_steps(run, position, interrupt, on_step, is_shown)
            adapter_path = None if stopped == INTERRUPTED else finish(run, position)
    finally:
        caught.show()  # after an error too: a warning may tell why
    first_step_seconds = first and first - started
    return make_report(
        run, position, stopped, adapter_path, warnings=caught.count(),
        seconds=time.perf_counter() - started, first_step_seconds=first_step_seconds,
    )  # fmt: skip


def run_steps(run: TrainingRun, progress: Progress, interrupt, on_step=None, is_shown=False):
    """Takes steps until the last, or until something stops the run.

    Returns:
        The Progress, why it stopped, and when the first step was done (or None).
    """
    config, stopped, first_step_at = run.config, None, None
    timestep_count = run.noise_scheduler.config.num_train_timesteps
    if progress.step == 0:
        progress, _ = look(run, progress)
    with tqdm(
        total=config.max_train_steps, initial=progress.step, disable=not is_shown, unit="step"
    ) as bar:
        while progress.step < config.max_train_steps and not stopped:
            begun, before = time.perf_counter(), progress
            batch = draw_batch(
                run.train, config, timestep_count, progress.step,
                positions=run.positions, excluded=progress.excluded,
            )  # fmt: skip
            progress, loss, norm, gate = find_gradients(run, batch, progress)
            learning_rate = learning_rate_at(progress.step, config, progress.lr_scale)
            gate = gate or take_step(run, learning_rate, norm, progress.loss_scale)
            if not gate:
                progress = progress.after_good_step(loss, time.perf_counter() - begun)
                progress, gate = look(run, progress)
            if gate:
                seconds = time.perf_counter() - begun
                progress = drop_step(run, batch, before, gate, learning_rate, seconds)
                progress, stopped = go_back(run, progress)
            first_step_at = first_step_at or time.perf_counter()
            record = make_record(before, progress, loss, norm, learning_rate, config)
            tell(run, record, progress, bar, on_step)
            stopped = stopped or find_reason_to_stop(run, progress, interrupt)
            if not progress.bad_in_row and not gate:
                save_if_due(run, progress, stopped)
    if not stopped and not progress.losses:
        stopped = f"given up: not one step was finite ({progress.dropped[-1].message})"
    return progress, stopped or FINISHED, first_step_at


def find_gradients(run: TrainingRun, batch, progress: Progress):
    """Computes the gradients of a step; for fp16 at the largest scale that fits.

    Returns:
        The Progress with that scale (where not even 1 helps, the scale is not at fault and stays),
        and what `compute_gradients` returned.
    """
    key = (run.config.seed, "dropout", progress.step, run.accelerator.process_index)
    tried = progress
    while True:
        with keyed_dropout(run.device, *key):
            loss, norm, gate = compute_gradients(run, batch, tried.loss_scale)
        if gate != "gradients":
            return tried, loss, norm, gate
        if tried.loss_scale <= 1:
            return progress, loss, norm, gate
        tried = tried.with_smaller_loss_scale()


def look(run: TrainingRun, progress: Progress):
    """Measures the validation loss and draws the validation prompts, where it is time for them.

    Returns:
        The Progress, and "validation" if the loss was not finite, else None.
    """
    config, is_last = run.config, progress.step == run.config.max_train_steps
    every = config.validation_steps if run.validation else None
    if every and (is_last or progress.step % every == 0):
        loss = measure_validation_loss(run)
        if not math.isfinite(loss):
            return progress, "validation"
        progress = progress.after_look(loss)
    is_time = is_last or progress.step % config.validation_image_steps == 0
    if config.validation_prompts and is_time:
        pictures = draw_pictures(run, progress.step)
        progress = replace(progress, validation_images=(*progress.validation_images, pictures))
    return progress, None


def find_reason_to_stop(run: TrainingRun, progress: Progress, interrupt):
    """Returns why the run shall stop here, the same in all processes, or None."""
    patience = run.config.early_stopping_patience
    if patience and progress.looks_since_best() >= patience:
        return (
            f"early stopping: the validation loss has not fallen below {progress.best[1]:.4f} of "
            f"step {progress.best[0]} in {patience} looks"
        )
    is_asked = any_process(run.accelerator, interrupt.is_requested)
    return INTERRUPTED if is_asked and progress.step < run.config.max_train_steps else None


def save_if_due(run: TrainingRun, progress: Progress, stopped):
    """Saves a checkpoint every so many steps, at the end, and of the best if that is to be kept."""
    config = run.config
    is_last = bool(stopped) or progress.step == config.max_train_steps
    is_best = bool(config.early_stopping_patience) and progress.best_step == progress.step
    if is_last or is_best or progress.step % config.checkpointing_steps == 0:
        save(run, progress)


def make_record(before, after, loss, norm, learning_rate, config) -> TrainedStep:
    """Returns the TrainedStep of the step between two Progresses."""
    dropped = after.dropped[-1] if len(after.dropped) > len(before.dropped) else None
    is_look = len(after.validation_losses) > len(before.validation_losses)
    return TrainedStep(
        step=before.step,
        loss=None if dropped else loss,
        learning_rate=learning_rate,
        gradient_norm=None if dropped else norm,
        images_per_second=after.images_done(config.effective_batch) / after.train_seconds,
        validation_loss=after.validation_losses[-1][1] if is_look else None,
        dropped=dropped,
    )


def tell(run: TrainingRun, record: TrainedStep, progress: Progress, bar, on_step):
    """Shows a step in the progress bar, and hands it to the trackers and to whoever watches."""
    if not run.accelerator.is_main_process:
        return
    bar.n = progress.step
    if record.dropped and not bar.disable:
        bar.write(str(record.dropped))
    elif not record.dropped:
        postfix = {"loss": f"{record.loss:.4f}", "lr": f"{record.learning_rate:.2g}"}
        if not find_emulation():
            postfix["images/s"] = f"{record.images_per_second:.1f}"
        bar.set_postfix(postfix, refresh=False)
    bar.refresh()
    values = {
        "loss": record.loss, "learning_rate": record.learning_rate,
        "gradient_norm": record.gradient_norm, "validation_loss": record.validation_loss,
    }  # fmt: skip
    run.accelerator.log({k: v for k, v in values.items() if v is not None}, step=record.step)
    if on_step:
        on_step(record)

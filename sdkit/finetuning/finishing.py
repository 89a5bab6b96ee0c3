"""The ends of a training: what is said before its first step, and what is kept after its last."""

from pathlib import Path

from sdkit.device import describe_environment
from sdkit.emulate import active as find_emulation
from sdkit.finetuning.adapter import write_adapter
from sdkit.finetuning.adapter_file import pack_adapter, unpack_adapter
from sdkit.finetuning.checkpoints import ADAPTER_FILE, find_checkpoint, load_checkpoint
from sdkit.finetuning.processes import from_main
from sdkit.finetuning.progress import Progress
from sdkit.finetuning.report import TrainReport
from sdkit.finetuning.training_run import TrainingRun
from sdkit.run_folder import replace_file
from sdkit.validation import ValidationError


def describe_run(run: TrainingRun, progress: Progress) -> str:
    """Returns a few lines: what is trained, on what, and how a step is cut."""
    config, count = run.config, sum(parameter.numel() for parameter in run.parameters)
    held_out = f", {len(run.validation.names)} held out" if run.validation else ""
    processes = run.accelerator.num_processes
    rows = [
        ("adapter", f"rank {config.rank} on {', '.join(config.targets)}: {count:,} parameters"),
        ("images", f"{len(run.train.names)}{held_out}; {config.effective_batch} a step"),
        ("device", f"{run.device}, {config.mixed_precision} mixed precision"),
        ("batches", str(run.micro_batch)),
    ]
    rows += [("processes", processes)] if processes > 1 else []
    rows += [("resumed", f"after step {progress.step}")] if progress.step else []
    rows += [("note", notice) for notice in run.notices]
    return "\n".join(f"{name:12}{value}" for name, value in rows)


def finish(run: TrainingRun, progress: Progress) -> Path:
    """Writes the adapter: of the last step, or of the best where the run was to stop early.

    Returns:
        Its path.

    Raises:
        ValidationError: It is not finite, or cannot be written; the checkpoints stay.
    """
    best = progress.best_step if run.config.early_stopping_patience else None
    if best not in (None, progress.step):
        folder = find_checkpoint(run.folder, best)
        _, adapter, _ = from_main(run.accelerator, lambda: load_checkpoint(folder))
        write_adapter(run.pipe, unpack_adapter(adapter))
    path = run.folder / ADAPTER_FILE
    if run.accelerator.is_main_process:
        content = pack_adapter(run.pipe, run.metadata)
        try:
            with replace_file(path) as temporary:
                temporary.write_bytes(content)
        except OSError as error:
            raise ValidationError(
                f"{path}: cannot be written ({error.strerror}). Expected room and permission to "
                "write; the checkpoints are there: resume."
            ) from error
    run.accelerator.end_training()
    return path


def make_report(
    run: TrainingRun, progress: Progress, stopped, adapter_path, *, warnings, seconds,
    first_step_seconds,
) -> TrainReport:  # fmt: skip
    """Puts the TrainReport together and writes it."""
    emulated = find_emulation()
    is_timed = not emulated and progress.train_seconds > 0
    images = progress.images_done(run.config.effective_batch)
    report = TrainReport(
        stopped=stopped,
        adapter_path=adapter_path and str(adapter_path),
        run_folder=str(run.folder),
        steps_done=len(progress.losses),
        dropped_steps=progress.dropped,
        excluded_images=tuple(run.train.names[index] for index in progress.excluded),
        rollbacks=progress.rollbacks,
        losses=progress.losses,
        validation_losses=progress.validation_losses,
        validation_images=progress.validation_images,
        images_per_second=images / progress.train_seconds if is_timed else None,
        train_seconds=progress.train_seconds if is_timed else None,
        seconds=seconds,
        first_step_seconds=first_step_seconds,
        micro_batch=str(run.micro_batch),
        device=str(run.device),
        processes=run.accelerator.num_processes,
        trained_parameters=sum(parameter.numel() for parameter in run.parameters),
        warnings=warnings,
        notices=run.notices,
        settings=run.config.to_dict(),
        environment=describe_environment(str(run.device)),
        emulated=emulated,
    )
    if run.accelerator.is_main_process:
        report.save()
    return report

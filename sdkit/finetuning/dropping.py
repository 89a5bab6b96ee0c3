"""What happens to a step that is not finite: it is explained, and too many of them go back."""

from dataclasses import replace

from accelerate.utils import gather_object

from sdkit.finetuning.adapter import find_trained_components
from sdkit.finetuning.batches import Batch, choose_indices
from sdkit.finetuning.checkpoints import find_last_checkpoint
from sdkit.finetuning.gates import DroppedStep, explain, find_bad_samples, find_guilty, name_images
from sdkit.finetuning.held_out import find_bad_held_out
from sdkit.finetuning.progress import Progress
from sdkit.finetuning.training_run import TrainingRun, restore

# After these the weights themselves are wrong: there is nothing to wait for.
FATAL_GATES = ("weights", "validation")


def drop_step(run: TrainingRun, batch: Batch, progress: Progress, gate, learning_rate, seconds):
    """Explains why a step is dropped, and counts it.

    An image whose own numbers are bad would spoil every batch that it is in: it is left out from
    now on.

    Args:
        run: The training; the bad gradients are still there, and are thrown away.
        batch: This process's samples, on the CPU.
        progress: Before the step.
        gate: Where it was stopped.
        learning_rate: That the step had.
        seconds: That it took.

    Returns:
        The Progress after it.
    """
    run.optimizer.zero_grad(set_to_none=True)
    if gate in FATAL_GATES:
        return progress.after_bad_step(_explain_state(run, progress, gate, learning_rate), seconds)
    found = gather_object([_examine(run, batch, gate)])  # of all processes
    named = [one for one in found if one["positions"]] or found
    images = tuple(dict.fromkeys(name for one in named for name in one["images"]))
    message = "; ".join(dict.fromkeys(one["message"] for one in named if one["message"]))
    dropped = DroppedStep(progress.step, gate, images, named[0]["cause"], message)
    if gate != "batch":
        return progress.after_bad_step(dropped, seconds)
    indices = choose_indices(len(run.train.names), run.config, progress.step, progress.excluded)
    bad = {indices[position] for one in named for position in one["positions"]}
    return progress.after_bad_step(dropped, seconds, bad)


def _explain_state(run, progress, gate, learning_rate) -> DroppedStep:
    """Why the weights or the validation loss are not finite after a step that was."""
    bad = find_bad_held_out(run) if gate == "validation" else ()
    if 0 < len(bad) < len(run.validation.names):
        message = f"the loss of {', '.join(bad)} alone is not finite, which is held out"
        return DroppedStep(progress.step, gate, bad, "bad-input", message)
    message = f"the step at learning rate {learning_rate:.3g} left values that are not finite"
    return DroppedStep(progress.step, gate, (), "diverged", message)


def _examine(run, batch, gate):
    """What this process finds in its share: positions, images, cause and message."""
    if gate == "batch":
        bad = find_bad_samples(batch)
        names = dict(zip(batch.positions, batch.names, strict=True))
        message = "; ".join(f"{names[p]}: {what}" for p, what in bad.items())
        return {
            "positions": tuple(bad), "images": name_images(batch, bad), "cause": "bad-input",
            "message": message and f"{message}; it is left out from now on",
        }  # fmt: skip

    batch = batch.to(run.device)
    guilty = find_guilty(batch, run.measure_share, run.parameters)
    components = {"unet": run.pipe.unet, **find_trained_components(run.pipe)}
    cause, message = explain(batch, guilty, run.measure_share, components)
    is_models = len(guilty) == len(batch) > 1
    return {
        "positions": guilty, "images": () if is_models else name_images(batch, guilty),
        "cause": cause, "message": message,
    }  # fmt: skip


def go_back(run: TrainingRun, progress: Progress):
    """Goes back to the last checkpoint if too many steps in a row were dropped, and then gives up.

    Args:
        run: The training; its weights and moments may be replaced.
        progress: After a dropped step.

    Returns:
        The Progress to go on with, and why the run stops, or None.
    """
    config, last = run.config, progress.dropped[-1]
    if len(progress.excluded) == len(run.train.names):
        return progress, f"given up: every image is bad ({last.message})"
    if last.gate not in FATAL_GATES and progress.bad_in_row < config.max_bad_steps:
        return progress, None
    saved = restore(run, find_last_checkpoint(run.folder))
    if progress.rollbacks < config.max_rollbacks:
        return progress.rolled_back_to(saved, config.rollback_lr_factor), None
    kept = replace(
        saved, dropped=progress.dropped, excluded=progress.excluded, rollbacks=progress.rollbacks,
        lr_scale=progress.lr_scale, steps_tried=progress.steps_tried,
        train_seconds=progress.train_seconds,
    )  # fmt: skip
    seen = f"{progress.bad_in_row} steps in a row were not finite"
    if last.gate in FATAL_GATES:
        seen = f"not finite at the {last.gate} gate"
    return kept, (
        f"given up: {seen}, after {progress.rollbacks} returns to a checkpoint "
        f"({last.cause}: {last.message})"
    )

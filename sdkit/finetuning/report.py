"""What a training came to: the TrainReport that `train_lora` returns and writes."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from sdkit.run_folder import replace_file

REPORT_FILE = "train_report.json"
FINISHED, INTERRUPTED = "finished", "interrupted"


@dataclass(frozen=True)
class TrainReport:
    """A training, from its settings to its adapter.

    Attributes:
        stopped: Why it ended: "finished", "interrupted", "early stopping: ..." or "given up: ...".
        adapter_path: The adapter's file; None if the run was interrupted before its end.
        run_folder: Where everything is.
        steps_done: Optimiser steps that were taken.
        dropped_steps: A DroppedStep for each that was not, with the images and the cause.
        excluded_images: Names of images that were shown no more: their own numbers are bad.
        rollbacks: How often the run went back to a checkpoint.
        losses: (step, training loss) of each step that was taken.
        validation_losses: (step, validation loss), before the first step and on the way.
        validation_images: Folders with the pictures drawn on the way.
        images_per_second: While training; without validation, pictures and saving. None under an
            emulation.
        train_seconds: The same in seconds.
        seconds: From the call to the report; of this process alone if the run was resumed.
        first_step_seconds: From the call to the end of the first step of this process.
        micro_batch: How a step was cut, and why.
        device: Such as "mps".
        processes: How many took part.
        trained_parameters: Numbers in the adapter.
        warnings: {"category", "message", "count"} of each warning on the way.
        notices: What was decided for this machine.
        settings: The configuration.
        environment: Versions, chip and such.
        emulated: The emulation that was active, or None.
    """

    stopped: str
    adapter_path: str | None
    run_folder: str
    steps_done: int
    dropped_steps: tuple
    excluded_images: tuple
    rollbacks: int
    losses: tuple
    validation_losses: tuple
    validation_images: tuple
    images_per_second: float | None
    train_seconds: float | None
    seconds: float
    first_step_seconds: float | None
    micro_batch: str
    device: str
    processes: int
    trained_parameters: int
    warnings: tuple
    notices: tuple
    settings: dict
    environment: dict
    emulated: str | None = None

    @property
    def is_good(self) -> bool:
        """Whether the run came to an end of its own choice."""
        return self.stopped == FINISHED or self.stopped.startswith("early stopping")

    def to_json(self) -> str:
        """Everything as JSON."""
        return json.dumps(asdict(self), indent=2)

    def save(self) -> Path:
        """Writes `train_report.json` into the run's folder."""
        path = Path(self.run_folder) / REPORT_FILE
        with replace_file(path) as temporary:
            temporary.write_text(self.to_json() + "\n", encoding="utf-8")
        return path

    def __str__(self):
        """A few aligned lines."""
        rows = [("stopped", self.stopped), ("adapter", self.adapter_path or "none yet")]
        rows.append(("steps", f"{self.steps_done} done, {len(self.dropped_steps)} dropped"))
        rows += [("", str(dropped)) for dropped in self.dropped_steps]
        rows += [("left out", ", ".join(self.excluded_images))] if self.excluded_images else []
        rows += [("went back", f"{self.rollbacks} times")] if self.rollbacks else []
        if self.losses:
            first, last = _mean(self.losses[:10]), _mean(self.losses[-10:])
            rows.append(("loss", f"{first:.4f} in the first 10 steps, {last:.4f} in the last"))
        if self.validation_losses:
            (_, before), (_, after) = self.validation_losses[0], self.validation_losses[-1]
            rows.append(("validation", f"{before:.4f} before, {after:.4f} at the end"))
        if self.images_per_second:
            rows.append(("speed", f"{self.images_per_second:.1f} images/s on {self.device}"))
        rows.append(("batches", self.micro_batch))
        rows += [("note", notice) for notice in self.notices]
        rows += [("warning", f"{w['message']} ({w['count']} times)") for w in self.warnings]
        rows += [("emulated", self.emulated)] if self.emulated else []
        if self.stopped == INTERRUPTED:
            rows.append(("resume", f"sdkit train --resume {self.run_folder}"))
        return "\n".join(f"{name:12}{' '.join(str(value).split())}" for name, value in rows)


def _mean(losses):
    return sum(loss for _, loss in losses) / len(losses)

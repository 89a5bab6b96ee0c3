"""How far a training has come: all that a resumed run must know besides weights and moments."""

from dataclasses import asdict, dataclass, replace

from sdkit.finetuning.gates import DroppedStep

# Of fp16: what GradScaler starts with, and after how many good steps it dares more.
LOSS_SCALE = 2.0**16
GROWTH_STEPS = 2000


@dataclass(frozen=True)
class Progress:
    """A point in a training.

    Attributes:
        step: The next one; all before it were taken or dropped. It is the sampler's position too,
            and with the seed it is the state of every generator.
        losses: (step, loss) of each step that was taken.
        validation_losses: (step, loss) of each look at the held-out images.
        validation_images: Folders of the pictures drawn on the way, within the run's.
        dropped: A DroppedStep for each that was not taken.
        bad_in_row: Dropped ones since the last good one.
        rollbacks: How often the run went back.
        lr_scale: What that has left of the learning rate.
        loss_scale: Of fp16; 1 otherwise.
        good_in_row: Steps since the loss scale changed.
        excluded: Indices of images whose own numbers are bad: shown no more.
        best: (step, validation loss) of the best look, or None.
        steps_tried: Taken or dropped, those among them that a return to a checkpoint undid.
        train_seconds: In steps alone.
        micro_batch: How a step is cut, see `MicroBatch`.
        identity: Of base model and data: a run goes on with the same ones or not at all.
    """

    step: int = 0
    losses: tuple = ()
    validation_losses: tuple = ()
    validation_images: tuple = ()
    dropped: tuple = ()
    bad_in_row: int = 0
    rollbacks: int = 0
    lr_scale: float = 1.0
    loss_scale: float = 1.0
    good_in_row: int = 0
    excluded: tuple = ()
    best: tuple | None = None
    steps_tried: int = 0
    train_seconds: float = 0.0
    micro_batch: dict | None = None
    identity: dict | None = None

    def after_good_step(self, loss, seconds) -> "Progress":
        """The progress when a step was taken."""
        good = self.good_in_row + 1
        grows = self.loss_scale > 1 and good % GROWTH_STEPS == 0
        return replace(
            self,
            step=self.step + 1,
            losses=(*self.losses, (self.step, loss)),
            bad_in_row=0,
            good_in_row=good,
            loss_scale=self.loss_scale * (2 if grows else 1),
            steps_tried=self.steps_tried + 1,
            train_seconds=self.train_seconds + seconds,
        )

    def after_bad_step(self, dropped: DroppedStep, seconds, excluded=()) -> "Progress":
        """The progress when a step was dropped."""
        return replace(
            self,
            step=self.step + 1,
            dropped=(*self.dropped, dropped),
            bad_in_row=self.bad_in_row + 1,
            excluded=tuple(sorted({*self.excluded, *excluded})),
            steps_tried=self.steps_tried + 1,
            train_seconds=self.train_seconds + seconds,
        )

    def with_smaller_loss_scale(self) -> "Progress":
        """The progress when fp16 gradients overflowed: the step is tried again."""
        return replace(self, loss_scale=self.loss_scale / 2, good_in_row=0)

    def rolled_back_to(self, saved: "Progress", lr_factor) -> "Progress":
        """The progress of a checkpoint, with what was learnt about the run since."""
        return replace(
            saved,
            dropped=self.dropped,
            excluded=self.excluded,
            rollbacks=self.rollbacks + 1,
            lr_scale=self.lr_scale * lr_factor,
            steps_tried=self.steps_tried,
            train_seconds=self.train_seconds,
            bad_in_row=0,
        )

    def after_look(self, loss) -> "Progress":
        """The progress with one more validation loss."""
        is_better = self.best is None or loss < self.best[1]
        return replace(
            self,
            validation_losses=(*self.validation_losses, (self.step, loss)),
            best=(self.step, loss) if is_better else self.best,
        )

    @property
    def best_step(self) -> int | None:
        """Steps taken at the least validation loss; None where none was measured."""
        return self.best[0] if self.best else None

    def images_done(self, effective_batch) -> int:
        """Images that went through, in steps taken, dropped and undone alike."""
        return self.steps_tried * effective_batch

    def looks_since_best(self) -> int:
        """How many looks at the validation loss in a row were no better than the best."""
        return sum(step > self.best_step for step, _ in self.validation_losses) if self.best else 0

    def to_dict(self) -> dict:
        """As JSON types."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict) -> "Progress":
        """What `to_dict` gave, read back from JSON."""
        known = {name: _freeze(values[name]) for name in cls.__dataclass_fields__}
        dropped = tuple(
            DroppedStep(**{**fields, "images": tuple(fields["images"])})
            for fields in values["dropped"]
        )
        return cls(**{**known, "dropped": dropped})


def _freeze(value):
    return tuple(map(_freeze, value)) if isinstance(value, list) else value

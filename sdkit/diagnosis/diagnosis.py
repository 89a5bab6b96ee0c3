"""The answer to "why is my image black": stage, step, module, op, cause, evidence and proof."""

import json
import textwrap
from dataclasses import dataclass, field

from sdkit.diagnosis.cause import REFUTED_BY
from sdkit.diagnosis.op_record import BadOp
from sdkit.generation.record import plain
from sdkit.validation import ValidationError

COLUMNS = 100
KINDS = {  # of what is read of a diagnosis from JSON
    "stage": str, "step": int | None, "module": str | None, "op": str | None, "evidence": dict,
    "remedy": str, "proven": bool | None, "proof": str, "reproduction": str | None,
    "environment": dict, "emulated": str | None,
}  # fmt: skip
HEALTHY = ("healthy", "dark-but-valid")


@dataclass(frozen=True)
class Diagnosis:
    """What broke, where, why, and how that is known.

    Attributes:
        stage: "text_encoder", "unet" (a transformer too), "vae", "safety_checker" or "none".
        step: Index of the denoising loop, None outside of it.
        module: Dotted path from the pipeline, `unet.down_blocks.0.resnets.0.conv1`; None where
            no module is to blame.
        op: Such as "aten.baddbmm.default", or None.
        cause: One of `sdkit.diagnosis.CAUSES`.
        evidence: Numbers and findings, {what: value}.
        remedy: The smallest change, in one sentence.
        proven: Whether the run with the remedy came out valid; None if it was not tried.
        proof: What was run to prove it, in one sentence, or why nothing was.
        reproduction: For a backend fault, a script of at most 30 lines with torch alone that shows
            it; else None.
        bad_op: The first bad op with what it was given, or None.
        environment: Versions, chip, device; nothing personal.
        emulated: Which emulation it ran under, or None.
    """

    stage: str
    step: int | None
    module: str | None
    op: str | None
    cause: str
    evidence: dict = field(default_factory=dict)
    remedy: str = ""
    proven: bool | None = None
    proof: str = ""
    reproduction: str | None = None
    bad_op: BadOp | None = None
    environment: dict = field(default_factory=dict)
    emulated: str | None = None

    @property
    def is_healthy(self) -> bool:
        """Whether nothing is broken."""
        return self.cause in HEALTHY

    @property
    def refuted_by(self) -> str:
        """What would show that this cause is the wrong one."""
        return REFUTED_BY[self.cause]

    @property
    def message(self) -> str:
        """One line: the cause and where."""
        step = "" if self.step is None else f", step {self.step}"
        where = self.module or self.stage
        op = f", {self.op}" if self.op else ""
        return self.cause if self.stage == "none" else f"{self.cause}: {where}{step}{op}"

    def __str__(self):
        """The whole finding as a few aligned lines."""
        proven = {True: "yes", False: "no", None: "nothing run" if self.proof else "not tried"}
        rows = [("cause", self.cause), ("stage", self.stage)]
        rows += [] if self.step is None else [("step", self.step)]
        rows += [("module", self.module)] if self.module else []
        rows += [("op", self.op)] if self.op else []
        if self.bad_op and self.bad_op.source:
            rows += [("source", self.bad_op.source), ("", self.bad_op.source_line)]
        rows += [(name.replace("_", " "), value) for name, value in self.evidence.items()]
        rows += [("refuted by", self.refuted_by)] if self.refuted_by else []
        rows += [("remedy", self.remedy)] if self.remedy else []
        proof = f": {self.proof}" if self.proof else ""
        rows += [] if self.is_healthy else [("proven", proven[self.proven] + proof)]
        rows += [("emulated", self.emulated)] if self.emulated else []
        width = max(len(name) for name, _ in rows) + 2
        return "\n".join(
            textwrap.fill(
                show(value),
                COLUMNS,
                initial_indent=f"{name:{width}}",
                subsequent_indent=" " * width,
                break_long_words=False,
                break_on_hyphens=False,
            )
            for name, value in rows
        )

    def to_dict(self) -> dict:
        """Everything as JSON types."""
        fields = {name: value for name, value in vars(self).items() if name != "bad_op"}
        return {
            **fields,
            "refuted_by": self.refuted_by,
            "bad_op": self.bad_op and self.bad_op.to_dict(),
        }

    def to_json(self) -> str:
        """Everything as JSON."""
        return json.dumps(plain(self.to_dict()), indent=2, ensure_ascii=False, allow_nan=False)

    @classmethod
    def from_json(cls, text) -> "Diagnosis":
        """Returns the diagnosis that `to_json` wrote; its op cannot be run again.

        Raises:
            ValidationError: It is no such JSON.
        """
        try:
            content = json.loads(text)
            if content.pop("refuted_by") != REFUTED_BY[content["cause"]]:
                raise ValueError("another version wrote it")
            for name, kinds in KINDS.items():
                if not isinstance(content[name], kinds):
                    raise TypeError(f"{name} is {content[name]!r:.60}")
            if (content["step"] or 0) < 0:
                raise ValueError(f"step is {content['step']}")
            bad_op = content.pop("bad_op")
            return cls(**content, bad_op=bad_op and BadOp.from_dict(bad_op))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValidationError(
                f"diagnosis: {type(error).__name__}: {error}. Expected what to_json wrote."
            ) from error


def show(value) -> str:
    """A value as people write it."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.5g}"
    if isinstance(value, (list, tuple)):
        return ", ".join(map(show, value)) or "none"
    return str(value)

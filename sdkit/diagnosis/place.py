"""Puts a place and a cause together: where in the pipeline, in the words of a Diagnosis."""

from sdkit.diagnosis.cause import Cause
from sdkit.diagnosis.diagnosis import Diagnosis
from sdkit.diagnosis.op_record import BadOp
from sdkit.diagnosis.reproduction import shows_the_fault, write_reproduction
from sdkit.guarding import TEXT_ENCODERS, VAES


def describe(stage, step, module, bad: BadOp | None, cause: Cause) -> Diagnosis:
    """Puts a place and a cause together; a fault of the backend gets its reproduction."""
    evidence, script = cause.evidence, None
    breaks_its_contract = cause.name == "uninitialised-memory" and bad.call.ignored
    if bad and (cause.name == "backend-fault" or breaks_its_contract):
        script = write_reproduction(bad)
        if not shows_the_fault(script):
            script = None
            evidence = {**evidence, "reproduction": "inputs drawn anew do not show it"}
    return Diagnosis(
        stage=stage,
        step=step,
        module=cause.module or module or None,
        op=bad and bad.op,
        cause=cause.name,
        evidence=evidence,
        remedy=cause.remedy,
        reproduction=script,
        bad_op=bad,
    )


def stage_of(module: str) -> str:
    """The stage that a module's path belongs to; what encodes an image stands with the texts."""
    root = module.partition(".")[0]
    if root.startswith(TEXT_ENCODERS) or "encoder" in root:
        return "text_encoder"
    return "vae" if root in VAES else "unet"


def place_of(bad: BadOp) -> str:
    """The module that ran an op, or the component that had run last."""
    return bad.module or bad.after

"""A whole pipeline call under the op-level trace, with every module that takes part in it."""

from sdkit.diagnosis.op_record import BadOp
from sdkit.diagnosis.place import place_of, stage_of
from sdkit.diagnosis.trace import find_first_bad_op
from sdkit.guarding import DENOISERS, find_components, find_denoisers
from sdkit.loading.modules import find_models
from sdkit.steps import StepCounter


def find_in_whole_run(pipe, call, look_for="bad") -> tuple[BadOp | None, int | None]:
    """Returns the op that the trace stops at in a pipeline call, and its step.

    Args:
        pipe: The pipeline.
        call: Runs it, as the user does.
        look_for: As in `find_first_bad_op`.

    Returns:
        The op and the index of the denoising loop, None outside of the loop; (None, None) if there
        was no such op.
    """
    with StepCounter(pipe).following(find_denoisers(pipe)) as steps:
        bad = find_first_bad_op(call, list_modules(pipe), look_for=look_for)
    if bad is None or stage_of(place_of(bad)) != "unet":
        return bad, None
    if place_of(bad).startswith(DENOISERS):
        return bad, steps.step
    return bad, 0 if steps.step is None else steps.step + 1  # a ControlNet runs before the UNet


def list_modules(pipe) -> dict:
    """{name: module} of all that computes in a pipeline but the safety checker.

    Beside what the guard watches it holds what makes conditioning, a ControlNet or an image
    encoder.
    """
    models = {**find_models(pipe), **find_components(pipe)}
    models.pop("safety_checker", None)
    return models

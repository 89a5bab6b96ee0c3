"""The failures of known cause that the ladder is climbed on, each planted alone.

A kernel that reads stale memory, one that rounds too early, numbers too large in one place or in
all, a weight that is NaN. The overflows are planted so that float32 draws the healthy model's very
images, so one reference does for all but early rounding, which needs harder attention.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

from tqdm.auto import tqdm

from sdkit.attention import allow_unsafe_attention
from sdkit.diagnosis.ablation import on_device
from sdkit.diagnosis.specimens import (
    FLOAT16_MAXIMUM,
    overflow_unet,
    overflow_vae,
    raise_scores,
    spoil_weight,
)
from sdkit.diagnosis.timeline import measure_scores
from sdkit.emulate.mode import suspended
from sdkit.guarding import unguarded
from sdkit.loading import load_pipeline
from sdkit.precision.drawing import check_reference, draw_images
from sdkit.precision.headroom import measure_headroom
from sdkit.precision.ladder import Rung, climb
from sdkit.precision.rebalancing import amplify, find_largest
from sdkit.precision.streams import find_streams
from sdkit.validation import ValidationError

PROBE = {"prompts": "a shoe", "num_inference_steps": 2}  # to find out how large numbers are


@dataclass(frozen=True)
class Failure:
    """One fault of known cause.

    Attributes:
        name: Such as "VAE overflow".
        plant: Breaks a float32 pipeline in place; None leaves it whole.
        attention: As in `load_pipeline`.
        memory: What fresh memory of the emulated Mac holds.
        faults: What the emulated Mac gets wrong; `baddbmm` does no harm without slicing, or where
            memory holds zeros. A real device is as it is.
        keeps_picture: Whether float32 draws what the healthy model draws, bit for bit or, where
            the weights are spoilt, would have to.
    """

    name: str
    plant: Callable | None = None
    attention: str = "sdpa"
    memory: str = "zeros"
    faults: tuple[str, ...] = ("baddbmm-beta-zero",)
    keeps_picture: bool = True


def amplify_until_it_overflows(pipe):
    """Makes every stream of UNet and VAE larger by one power of two each, so that float16 is short.

    The least power at which the largest number of a stream is twice float16's maximum. float32
    draws the same image to the last bit.
    """
    headroom = measure_headroom(pipe, **PROBE)
    for name in ("unet", "vae"):
        model = getattr(pipe, name)
        largest = max(find_largest(headroom, find_streams(model), name).values())
        amplify(model, math.ceil(math.log2(2 * FLOAT16_MAXIMUM / largest)))


def raise_largest_scores(pipe):
    """Makes the UNet's hardest attention too hard for a kernel that rounds before it scales."""
    scores = [s for s in measure_scores(pipe, **PROBE) if s.module.startswith("unet")]
    raise_scores(pipe, max(scores, key=lambda score: score.unscaled))


HEALTHY = Failure("nothing (control)")
FAILURES = (
    HEALTHY,
    Failure("stale memory", attention="diffusers-sliced", memory="stale_float32"),
    Failure(
        "early rounding", raise_largest_scores, faults=("score-rounding",), keeps_picture=False
    ),
    Failure("UNet overflow", overflow_unet),
    Failure("VAE overflow", overflow_vae),
    Failure("overflow everywhere", amplify_until_it_overflows),
    Failure("one NaN weight", spoil_weight),
)  # fmt: skip


def choose_failures(names=()) -> tuple[Failure, ...]:
    """The named ones of `FAILURES` in their order, and the control in any case; all for none.

    Raises:
        ValidationError: A name that is none of theirs.
    """
    known = [failure.name for failure in FAILURES]
    for name in names:
        if name not in known:
            raise ValidationError(f"failures: {name!r} is not known; expected {', '.join(known)}.")
    return tuple(f for f in FAILURES if not names or f is HEALTHY or f.name in names)


def climb_failures(
    model, prompts, *, failures=FAILURES, backend="auto", seed=0, progress=True, **pipe_kwargs
) -> dict[str, list[Rung]]:
    """Runs every rung on every failure; on a CPU they run on the emulated Mac.

    A real device has the kernels that it has: there the faults of the emulated one are not planted.

    Args:
        model: As in `load_pipeline`; it should be healthy.
        prompts: One or a list.
        failures: Which; the control must be among them for `recommend` to know healthy float16.
        backend: As in `load_pipeline`.
        seed: Image i is drawn from seed + i.
        progress: Show the failures and the rungs.
        **pipe_kwargs: For the pipeline call.

    Returns:
        {name of the failure: its rungs, in order}.

    Raises:
        ValidationError: The healthy model's float32 is bad, so there is nothing to compare with.
    """
    prompts = [prompts] if isinstance(prompts, str) else list(prompts)
    healthy, _ = load_whole(model, backend, HEALTHY)
    with unguarded(healthy), suspended():
        reference = check_reference(draw_images(healthy, prompts, seed, pipe_kwargs))
    climbed = {}
    for failure in tqdm(failures, unit="failure", disable=not progress):
        pipe, is_emulated = load_whole(model, backend, failure)
        if failure.plant:
            failure.plant(pipe)
        here = (failure.memory, failure.faults) if is_emulated else ("as it comes", None)
        with on_device(*here), allow_unsafe_attention():
            climbed[failure.name] = climb(
                pipe, prompts, seed=seed, every_rung=True, progress=progress,
                reference=reference if failure.keeps_picture else None, **pipe_kwargs,
            )  # fmt: skip
    return climbed


def load_whole(model, backend, failure):
    """(the pipeline in float32 with the attention that a failure needs, whether it is emulated)."""
    with allow_unsafe_attention():  # it is what is to be cured
        pipe, report = load_pipeline(
            model, backend=backend, dtype="float32", attention=failure.attention, progress=False
        )
    pipe.set_progress_bar_config(disable=True)
    return pipe, report.device == "cpu"

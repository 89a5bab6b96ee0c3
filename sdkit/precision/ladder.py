"""The ladder: from the smallest change to float32 everywhere, each rung run and judged.

A rung is judged by what it draws, beside the float32 reference with fused attention: valid images,
PSNR, SSIM, bytes of weights. Seconds are measured where they are real, never under emulation.

What passes is drawn once more where fresh memory holds NaN, if what it holds can matter here. A
cure passes that too; what does not has only made the bytes that a kernel should not read harmless.
"""

import time
from contextlib import ExitStack
from dataclasses import dataclass, field

import numpy as np
from skimage.metrics import structural_similarity
from tqdm.auto import tqdm

from sdkit.device import synchronize
from sdkit.diagnosis.ablation import nan_filled_memory
from sdkit.emulate import active as find_emulation
from sdkit.emulate.again import emulate_again
from sdkit.emulate.mode import find_settings
from sdkit.finding import Finding, NonFiniteError
from sdkit.guarding import unguarded
from sdkit.loading.lifting import in_float32
from sdkit.loading.recipe import Recipe, count_bytes
from sdkit.precision.drawing import (
    check_reference,
    check_request,
    draw_guarded,
    draw_images,
    low_arithmetic,
    measure_psnr,
)
from sdkit.precision.rungs import fused_attention, list_steps
from sdkit.validation import ValidationError, judge_image

DECENT_DB = 30.0  # below it a picture differs visibly: finite, and wrong all the same


@dataclass(frozen=True)
class Rung:
    """What one rung gave.

    Attributes:
        name: Such as "rebalanced float16".
        change: What it changes, in one sentence.
        valid: Valid images.
        count: Images.
        weight_bytes: Of all weights once it has drawn, copies of what is rescued included; None if
            it could not be put on.
        psnr_db: The least of an image to the reference; None unless all are valid.
        ssim: The least of an image to the reference; None unless all are valid.
        seconds: An image; None under emulation or where nothing was drawn.
        note: Why it cannot be had here, or what it did; "" otherwise.
        problems: One an image: "NaN in the unet, step 0", "all-black"; None where it is valid.
        only_hides: Whether it draws right here, and not where fresh memory holds NaN.
        images: Float images (H, W, 3), None where NaN or Inf arose; empty if nothing was drawn.
        recipe: Of the planned rung.
    """

    name: str
    change: str
    valid: int
    count: int
    weight_bytes: int | None
    psnr_db: float | None = None
    ssim: float | None = None
    seconds: float | None = None
    note: str = ""
    problems: tuple[str | None, ...] = ()
    only_hides: bool = False
    images: tuple = field(default=(), repr=False, compare=False)
    recipe: Recipe | None = field(default=None, repr=False, compare=False)

    @property
    def is_proven(self) -> bool:
        """Whether every image is valid and like the reference, whatever fresh memory holds."""
        is_like = self.valid == self.count and self.psnr_db >= DECENT_DB
        return is_like and not self.only_hides

    def to_row(self) -> dict:
        """A row for a table."""
        return {
            "rung": self.name,
            "valid": f"{self.valid} of {self.count}",
            "weights MiB": self.weight_bytes and round(self.weight_bytes / 2**20, 1),
            "PSNR dB": self.psnr_db,
            "SSIM": self.ssim,
            "seconds an image": self.seconds,
            "only hides": self.only_hides,
            "note": self.note,
        }


def climb(
    pipe,
    prompts,
    *,
    seed=0,
    reference=None,
    every_rung=False,
    stop_when_proven=False,
    progress=True,
    **pipe_kwargs,
) -> list[Rung]:
    """Runs the rungs in order, on the device or under the emulation that is active.

    Args:
        pipe: A pipeline in float32, with the attention that it failed with. It is left as it was.
        prompts: One prompt or a list.
        seed: Image i is drawn from seed + i.
        reference: What it should draw, if its own float32 cannot tell: (N, H, W, 3) in [0, 1].
        every_rung: Change the attention too where it is safe already, for a table without gaps.
        stop_when_proven: Stop at the first rung that cures.
        progress: Show the rungs.
        **pipe_kwargs: For the pipeline call.

    Returns:
        One Rung each, in order; the first is the pipeline in float16 as it is.

    Raises:
        ValidationError: float32 with fused attention is bad itself.
    """
    prompts = check_request(pipe, prompts, seed, pipe_kwargs)
    rungs = []
    with unguarded(pipe):
        if reference is None:
            with in_float32(pipe), fused_attention(pipe):
                reference = check_reference(draw_images(pipe, prompts, seed, pipe_kwargs))
        steps = list_steps(pipe, prompts, seed, pipe_kwargs, every_rung)
        for name, change, applied in tqdm(steps, unit="rung", disable=not progress):
            rungs.append(
                try_rung(pipe, name, change, applied, prompts, seed, pipe_kwargs, reference)
            )
            if stop_when_proven and rungs[-1].is_proven:
                break
    return rungs


def try_rung(pipe, name, change, applied, prompts, seed, pipe_kwargs, reference) -> Rung:
    """Draws under one rung and judges it; one that cannot be put on says why."""
    count = len(prompts)
    try:
        with ExitStack() as stack:
            tell = stack.enter_context(applied())
            stack.enter_context(low_arithmetic(pipe))
            facts = {"weight_bytes": count_bytes(pipe)}
            synchronize(pipe._execution_device)
            started = time.perf_counter()
            drawn = draw_each(pipe, prompts, seed, pipe_kwargs)
            synchronize(pipe._execution_device)
            seconds = (time.perf_counter() - started) / count
            facts |= tell() if tell else {}
            problems = tuple(find_problem(*pair) for pair in drawn)
            is_whole = not any(problems)
            only_hides = is_whole and not holds_on_nan(pipe, prompts, seed, pipe_kwargs)
    except ValidationError as error:
        return Rung(name, change, 0, count, None, note=str(error))
    images = tuple(image for image, _ in drawn)
    return Rung(
        name=name,
        change=change,
        valid=problems.count(None),
        count=count,
        psnr_db=measure_psnr(images, reference) if is_whole else None,
        ssim=measure_ssim(images, reference) if is_whole else None,
        seconds=None if find_emulation() or not is_whole else seconds,
        problems=problems,
        only_hides=only_hides,
        images=images,
        **facts,
    )


def draw_each(pipe, prompts, seed, pipe_kwargs) -> list[tuple[np.ndarray | None, Finding | None]]:
    """(image, None), or (None, where it broke), of each prompt.

    All at once; one by one only where something breaks, for the first NaN ends a whole batch.
    """
    try:
        return [(image, None) for image in draw_guarded(pipe, prompts, seed, pipe_kwargs)]
    except NonFiniteError as error:
        if len(prompts) == 1:
            return [(None, error.finding)]
    return [
        pair
        for i, prompt in enumerate(prompts)
        for pair in draw_each(pipe, [prompt], seed + i, pipe_kwargs)
    ]


def holds_on_nan(pipe, prompts, seed, pipe_kwargs) -> bool:
    """Whether nothing breaks where fresh memory holds NaN; True where that can make no difference.

    That is so on a CPU, whose kernels keep their contracts, and where memory was chosen to be
    harmless, so that another fault can be seen alone.
    """
    settings = find_settings()
    if settings and settings["memory"] not in ("zeros", "nan"):
        memory = emulate_again({**settings, "memory": "nan"})
    elif settings is None and pipe._execution_device.type != "cpu":
        memory = nan_filled_memory()
    else:
        return True
    with memory:
        return draw_images(pipe, prompts, seed, pipe_kwargs) is not None


def find_problem(image, finding) -> str | None:
    """What is wrong with an image, in a few words; None if nothing is."""
    if finding is None:
        return judge_image(image).problem
    kind = "NaN" if finding.nan_count else "Inf"
    when = "" if finding.step is None else f", step {finding.step}"
    return f"{kind} in the {finding.stage}{when}"


def measure_ssim(images, reference) -> float:
    """The least structural similarity of an image to its reference."""
    return float(
        min(
            structural_similarity(theirs, ours, channel_axis=-1, data_range=1)
            for ours, theirs in zip(images, reference, strict=True)
        )
    )

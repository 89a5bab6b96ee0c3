"""The ladder: from the smallest change to float32 everywhere, each rung run and judged.

A rung is judged by what it draws, beside the float32 reference with fused attention: valid images,
PSNR, SSIM, bytes of weights. Seconds are measured where they are real, never under emulation.
"""

import copy
import time
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field

import numpy as np
import torch
from diffusers.models.attention_processor import Attention, AttnProcessor2_0
from skimage.metrics import structural_similarity
from tqdm.auto import tqdm

from sdkit.attention import find_unsafe_processors
from sdkit.device import synchronize
from sdkit.emulate import active as find_emulation
from sdkit.emulate.again import emulate_again
from sdkit.emulate.mode import find_settings
from sdkit.generation.record import describe_rescue
from sdkit.generation.rescue import Rescuer
from sdkit.guarding import unguarded
from sdkit.loading.lifting import in_float32
from sdkit.loading.modules import find_models
from sdkit.loading.recipe import Recipe, count_bytes, mixed_precision
from sdkit.precision.plan import (
    check_reference,
    draw_images,
    low_arithmetic,
    measure_psnr,
    plan_precision,
)
from sdkit.precision.rebalancing import rebalance
from sdkit.slicing import REPLACEABLE, use_sliced_attention
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
        weight_bytes: Of all weights.
        psnr_db: The least of an image to the reference; None without a valid one.
        ssim: The least of an image to the reference; None without a valid one.
        seconds: An image; None under emulation or where nothing was drawn.
        note: Why it cannot be had here, or what it did; "" otherwise.
        images: Float images (N, H, W, 3), or None where NaN or Inf arose.
        recipe: Of the planned rung.
    """

    name: str
    change: str
    valid: int
    count: int
    weight_bytes: int
    psnr_db: float | None = None
    ssim: float | None = None
    seconds: float | None = None
    note: str = ""
    images: np.ndarray | None = field(default=None, repr=False, compare=False)
    recipe: Recipe | None = field(default=None, repr=False, compare=False)

    @property
    def is_proven(self) -> bool:
        """Whether every image is valid and looks like the reference."""
        return self.valid == self.count and self.psnr_db >= DECENT_DB

    def to_row(self) -> dict:
        """A row for a table."""
        return {
            "rung": self.name,
            "valid": f"{self.valid} of {self.count}",
            "weights MiB": round(self.weight_bytes / 2**20, 1),
            "PSNR dB": self.psnr_db,
            "SSIM": self.ssim,
            "seconds an image": self.seconds,
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
    prompts = [prompts] if isinstance(prompts, str) else list(prompts)
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


def list_steps(pipe, prompts, seed, pipe_kwargs, every_rung=False):
    """(name, change, how to apply it) of each rung that there is for this pipeline here."""
    half, brain = torch.float16, torch.bfloat16
    settings = find_settings()
    steps = [("float16 as it is", "Nothing.", lambda: mixed_precision(pipe, [], half))]
    if settings and settings["faults"]:
        steps.append(
            (
                "newer torch (emulated)",
                "Upgrade torch: the kernel keeps its contract.",
                lambda: honest_kernel(pipe, settings),
            )
        )
    if every_rung or find_unsafe_processors(pipe):
        steps += [
            ("float16, SDPA", "Fused attention.", lambda: with_attention(pipe, fused_attention)),
            ("float16, safe slicing", "Slices that read no fresh memory.",
             lambda: with_attention(pipe, sliced_attention)),
        ]  # fmt: skip
    vae = ["vae"] if getattr(pipe, "vae", None) is not None else []
    return [
        *steps,
        ("bfloat16", "float32's range, 8 bits.", lambda: mixed_precision(pipe, [], brain)),
        ("float16, VAE float32", "The VAE in float32.", lambda: mixed_precision(pipe, vae, half)),
        ("rebalanced float16", "Powers of two moved within.", lambda: rebalanced(pipe)),
        ("planned float16", "The least float32 that draws right.",
         lambda: planned(pipe, prompts, seed, pipe_kwargs)),
        ("float16, rescued", "Bad calls again in float32.", lambda: rescued(pipe)),
        ("float32", "Everything in float32.", lambda: in_float32(pipe)),
    ]  # fmt: skip


def try_rung(pipe, name, change, applied, prompts, seed, pipe_kwargs, reference) -> Rung:
    """Draws under one rung and judges it; one that cannot be applied says why."""
    count, size = len(prompts), count_bytes(pipe)
    try:
        with ExitStack() as stack:
            extra = stack.enter_context(applied())
            stack.enter_context(low_arithmetic(pipe, torch.float16))
            weight_bytes = count_bytes(pipe)
            synchronize(pipe._execution_device)
            started = time.perf_counter()
            images = draw_images(pipe, prompts, seed, pipe_kwargs)
            synchronize(pipe._execution_device)
            seconds = None if find_emulation() else (time.perf_counter() - started) / count
    except ValidationError as error:
        return Rung(name, change, 0, count, size, note=str(error))
    note = extra() if callable(extra) else ""
    note = (
        f"float32: {', '.join(extra.float32) or 'nothing'}" if isinstance(extra, Recipe) else note
    )
    valid = 0 if images is None else sum(judge_image(image).valid for image in images)
    is_whole = valid == count
    return Rung(
        name=name,
        change=change,
        valid=valid,
        count=count,
        weight_bytes=weight_bytes,
        psnr_db=measure_psnr(images, reference) if is_whole else None,
        ssim=measure_ssim(images, reference) if is_whole else None,
        seconds=seconds,
        note=note,
        images=images,
        recipe=extra if isinstance(extra, Recipe) else None,
    )


def measure_ssim(images, reference) -> float:
    """The least structural similarity of an image to its reference."""
    return float(
        min(
            structural_similarity(theirs, ours, channel_axis=-1, data_range=1)
            for ours, theirs in zip(images, reference, strict=True)
        )
    )


@contextmanager
def restored_processors(pipe):
    """Yields the attention layers that may be given another processor; the old ones come back."""
    layers = [
        module
        for model in find_models(pipe).values()
        for module in model.modules()
        if isinstance(module, Attention) and type(module.processor) in REPLACEABLE
    ]
    with ExitStack() as undo:
        for layer in layers:
            undo.callback(layer.set_processor, layer.processor)
        yield layers


@contextmanager
def fused_attention(pipe):
    """SDPA in place of what slices or spells attention out."""
    with restored_processors(pipe) as layers:
        for layer in layers:
            layer.set_processor(AttnProcessor2_0())
        yield


@contextmanager
def sliced_attention(pipe):
    """Our own slices, which read no fresh memory."""
    with restored_processors(pipe):
        use_sliced_attention(pipe)
        yield


@contextmanager
def with_attention(pipe, attention):
    """float16 with another attention."""
    with attention(pipe), mixed_precision(pipe, [], torch.float16):
        yield


@contextmanager
def honest_kernel(pipe, settings):
    """float16 on the same emulated backend without its faults."""
    honest = {**settings, "faults": []}
    with mixed_precision(pipe, [], torch.float16), emulate_again(honest):
        yield


@contextmanager
def rebalanced(pipe):
    """Copies of UNet and VAE, rebalanced, in float16; yields what was moved."""
    with ExitStack() as undo:
        notes = []
        for name in ("unet", "vae"):
            model = getattr(pipe, name, None)
            if model is None:
                continue
            ours = copy.deepcopy(model)
            report = rebalance(ours)
            notes.append(f"{name}: {len(report.exponents)} streams moved")
            undo.callback(setattr, pipe, name, model)
            setattr(pipe, name, ours)
        undo.enter_context(mixed_precision(pipe, [], torch.float16))
        yield lambda: "; ".join(notes)


@contextmanager
def planned(pipe, prompts, seed, pipe_kwargs):
    """The least float32; yields its recipe."""
    recipe = plan_precision(pipe, prompts, seed=seed, progress=False, **pipe_kwargs)
    with mixed_precision(pipe, recipe.float32, torch.float16):
        yield recipe


@contextmanager
def rescued(pipe):
    """float16 with somebody standing by; yields what was rescued."""
    rescuer = Rescuer(pipe, is_emulated=find_emulation() is not None)
    with mixed_precision(pipe, [], torch.float16), rescuer.installed() as log:
        yield lambda: describe_rescue(log.to_dict())

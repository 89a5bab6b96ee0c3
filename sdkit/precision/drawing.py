"""Images drawn to be compared: under a guard, from given seeds, beside a float32 reference."""

from contextlib import nullcontext

import numpy as np
import torch
from skimage.metrics import peak_signal_noise_ratio

from sdkit.diagnosis.guarded_run import check_arguments, check_prompts
from sdkit.emulate import active as find_emulation
from sdkit.emulate import float16_arithmetic
from sdkit.finding import NonFiniteError
from sdkit.guarding import find_components, guard
from sdkit.validation import ValidationError, judge_image

# What is given to the pipeline here: one image a prompt, each from its own seed.
RESERVED = ("prompt", "prompt_embeds", "generator", "num_images_per_prompt", "return_dict")


class BadReferenceError(ValidationError):
    """float32 itself draws nothing to compare with: no change of precision cures that."""


def check_request(pipe, prompts, seed, pipe_kwargs) -> list[str]:
    """Returns the prompts as a list if the pipeline can be called so, before anything is computed.

    Raises:
        ValidationError: No pipeline, no prompt, or arguments that it does not take.
    """
    find_components(pipe)
    for name in RESERVED:
        if name in pipe_kwargs:
            raise ValidationError(
                f"{name}: expected none, for there is one image a prompt here, from its own seed."
            )
    check_arguments(pipe, seed, pipe_kwargs)
    return check_prompts(pipe, prompts, {})


def draw_images(pipe, prompts, seed, pipe_kwargs) -> np.ndarray | None:
    """Float images (N, H, W, 3) in [0, 1], or None where NaN or Inf arose on the way."""
    try:
        return draw_guarded(pipe, prompts, seed, pipe_kwargs)
    except NonFiniteError:
        return None


def draw_guarded(pipe, prompts, seed, pipe_kwargs) -> np.ndarray:
    """Float images (N, H, W, 3) in [0, 1]; image i is drawn from seed + i.

    Raises:
        NonFiniteError: NaN or Inf arose on the way; its `finding` says where.
    """
    generators = [torch.Generator("cpu").manual_seed(seed + i) for i in range(len(prompts))]
    with guard(pipe):
        output = pipe(prompts, generator=generators, output_type="np", **pipe_kwargs)
    return np.asarray(output.images, dtype=np.float64)


def check_reference(images):
    """Returns the float32 images if they are valid.

    Raises:
        BadReferenceError: float32 itself is bad, so there is nothing to compare with.
    """
    if images is None:
        raise BadReferenceError(
            "reference: float32 gives NaN or Inf as well, so precision is not the cause. "
            "Run sdkit.diagnose."
        )
    for index, image in enumerate(images):
        verdict = judge_image(image)
        if not verdict.valid:
            raise BadReferenceError(f"reference: float32's image {index} is bad: {verdict.message}")
    return images


def measure_psnr(images, reference) -> float:
    """The least PSNR of an image in dB; inf where they are equal, -inf where there are none."""
    if images is None:
        return -np.inf
    pairs = [(o, t) for o, t in zip(images, reference, strict=True) if not np.array_equal(o, t)]
    decibels = [peak_signal_noise_ratio(theirs, ours, data_range=1) for ours, theirs in pairs]
    return float(min(decibels, default=np.inf))


def low_arithmetic(pipe):
    """Emulated halves where the device would take minutes for them: on a CPU."""
    is_slow = pipe._execution_device.type == "cpu"
    return float16_arithmetic() if is_slow and not find_emulation() else nullcontext()


def describe_arithmetic(pipe) -> str | None:
    """Which emulation `low_arithmetic` computes under, or the one around it; None where none is."""
    with low_arithmetic(pipe):
        return find_emulation()

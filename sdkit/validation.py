"""Checks that return their input unchanged or raise: finite tensors, valid images, folders.

What is wrong with an image is judged in `verdict.py`; here a bad verdict becomes an error.
"""

import math
import os
from pathlib import Path

import numpy as np

from sdkit.verdict import ImageVerdict, judge_image, judge_image_file

__all__ = [
    "ImageVerdict",
    "ValidationError",
    "check_finite",
    "check_image",
    "check_image_file",
    "check_is_writable",
    "count_nonfinite",
    "is_finite",
    "judge_image",
    "judge_image_file",
    "validate_image_array",
]


class ValidationError(ValueError):
    """Something is not what it must be: where, what was seen, what was expected, the next step."""


def count_nonfinite(values):
    """Returns (NaN count, Inf count) of a torch tensor or a numpy array of any dtype and device."""
    values, library = _numbers(values)
    return int(library.isnan(values).sum()), int(library.isinf(values).sum())


def is_finite(values):
    """Returns True if a torch tensor or a numpy array holds no NaN and no Inf; one pass over it."""
    values, library = _numbers(values)
    return bool(library.isfinite(values).all())


def _numbers(values):
    """Returns the values and the library (torch or numpy) whose `isnan` reads them."""
    if not hasattr(values, "detach"):
        return values, np
    import torch  # here, so that checking image files does not wait for it

    if values.is_meta:
        raise TypeError("a meta tensor has no values")
    values = values.detach()
    is_float8 = values.is_floating_point() and values.element_size() == 1
    return (values.float() if is_float8 else values), torch  # isinf is not written for float8


def check_finite(tensor, where):
    """Returns the tensor unchanged, or says how many of its values are NaN or Inf.

    Args:
        tensor: torch tensor or numpy array of any shape, dtype and device; integers always pass.
        where: What the tensor is, for the message, such as "vae.decoder" or "latents at step 3".

    Returns:
        The very same object.

    Raises:
        ValidationError: A value is NaN or Inf, or this is no array of numbers.
    """
    try:
        if is_finite(tensor):
            return tensor
    except TypeError as error:
        raise ValidationError(
            f"{where}: got {type(tensor).__name__} ({error}). "
            "Expected a torch tensor or a numpy array of numbers."
        ) from error
    nan_count, inf_count = count_nonfinite(tensor)
    dtype = str(getattr(tensor, "dtype", type(tensor).__name__)).removeprefix("torch.")
    device = f", {tensor.device.type}" if hasattr(tensor, "detach") else ""
    raise ValidationError(
        f"{where} ({dtype}{device}): {nan_count} of {math.prod(np.shape(tensor))} values are NaN, "
        f"{inf_count} are Inf. Expected finite values. "
        + (
            'Load with dtype="float32", or see notebooks/02_fix_precision.ipynb.'
            if dtype in ("float16", "bfloat16")
            else "Find the first bad stage with notebooks/01_diagnose_black_images.ipynb."
        )
    )


def check_image(image):
    """Returns the image unchanged if `judge_image` finds it valid.

    Args:
        image: See `judge_image`.

    Returns:
        The very same object.

    Raises:
        ValidationError: The image is bad; the message is the verdict's.
    """
    verdict = judge_image(image)
    if not verdict.valid:
        raise ValidationError(f"image: {verdict.message}")
    return image


def validate_image_array(image_array, prompt):
    """Tells whether an image is valid, and prints one line that names the prompt.

    The report's function made right: its NaN test ran on uint8, where it can never fire. Hand it
    the float array, before the cast. Unlike the report's, float arrays are in [0, 1] alone.

    Args:
        image_array: See `judge_image`.
        prompt: The prompt that the image was made from.

    Returns:
        True if the image is valid.
    """
    verdict = judge_image(image_array)
    prompt = " ".join(str(prompt).split())
    print(f"  [{'OK' if verdict.valid else 'ERROR'}] {prompt}: {verdict.message}")
    return verdict.valid


def check_image_file(path):
    """Returns the path of a file that `judge_image_file` finds valid.

    Args:
        path: An image file.

    Returns:
        The path, as a `Path`.

    Raises:
        ValidationError: The file is bad; the message names it and says why.
    """
    verdict = judge_image_file(path)
    if not verdict.valid:
        raise ValidationError(f"{path}: {verdict.message}")
    return Path(path)


def check_is_writable(folder) -> Path:
    """Makes a folder, and returns it if a file can be made in it: before an hour of work.

    Raises:
        ValidationError: It cannot be written to.
    """
    folder = Path(folder)
    trial = folder / f".{os.getpid()}.part"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        trial.touch()
        trial.unlink()
    except OSError as error:
        raise ValidationError(
            f"{folder}: cannot be written to ({error.strerror}). Choose another output folder."
        ) from error
    return folder

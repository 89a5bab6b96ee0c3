"""Claims on what was seen: black pictures, a warning, a validator, and float16's numbers."""

import inspect
import io
import warnings

import numpy as np
import torch
from PIL import Image

from sdkit.diagnosis.claims.claim import (
    COMPUTED,
    CONFIRMED,
    DIFFUSERS,
    REFUTED,
    REPOSITORY,
    Claim,
    decide,
)


def cast_to_8_bits(images):
    """The pipeline's own cast, with what it warns of: (uint8 array, messages)."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        pixels = (images * 255).round().astype("uint8")
    return pixels, [str(warning.message) for warning in caught]


def count_shown_warnings(images) -> int:
    """How many lines a script shows that casts so many images of NaN in a loop, by default."""
    module = {}  # Python notes per module which line has warned already
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default")
        code = "for image in images: (image * 255).round().astype('uint8')"
        exec(compile(code, "script.py", "exec"), module | {"images": images})
    return len(caught)


def measure_black_png_bytes() -> int:
    """Bytes of an all-black PNG of 512 x 512 pixels."""
    file = io.BytesIO()
    Image.fromarray(np.zeros((512, 512, 3), np.uint8)).save(file, "PNG")
    return len(file.getvalue())


def judge_symptom() -> tuple[Claim, ...]:
    """Black pictures and the warning."""
    nan_images = np.full((3, 64, 64, 3), np.nan, np.float32)
    pixels, messages = cast_to_8_bits(nan_images)
    shown = count_shown_warnings(nan_images)
    png_bytes = measure_black_png_bytes()
    from diffusers.image_processor import VaeImageProcessor

    source = inspect.getsource(VaeImageProcessor)
    is_black = bool(messages) and int(pixels.max()) == 0
    return (
        Claim(
            "All three images are black, every pixel 0",
            "Sintoma", CONFIRMED, f"{REPOSITORY}/tree/dcd914a",
            "The three files are one and the same blob of 843 bytes, and it decodes to 0 "
            f"everywhere. Pillow writes a black 512 x 512 PNG in {png_bytes} bytes here.",
        ),
        Claim(
            "Three images of about 500 KB each were generated",
            "first write-up", decide(png_bytes > 400_000), COMPUTED,
            f"A black 512 x 512 PNG has {png_bytes} bytes. The size alone would have told.",
        ),
        Claim(
            "The colours asked for (black, brown, white) were checked: all match",
            "first write-up", REFUTED, f"{REPOSITORY}/tree/dcd914a",
            "The three files are byte for byte equal and black.",
        ),
        Claim(
            'RuntimeWarning "invalid value encountered in cast" means NaN or Inf before the cast',
            "Warning Durante Execução",
            decide(any("invalid value encountered in cast" in m for m in messages)), COMPUTED,
            f"Casting NaN says: {messages[0] if messages else 'nothing'}.",
        ),
        Claim(
            "The warning is normal on MPS, comes with the first image (warm-up) and is harmless",
            "first write-up", decide(shown == len(nan_images)), COMPUTED,
            f"Three images of NaN, cast one after the other, show {shown} warning: Python shows "
            "one a source line. All three images were black.",
        ),
        Claim(
            "NaN cast to uint8 becomes 0, so the picture is black",
            "Causa Raiz", decide(is_black), COMPUTED,
            f"On this machine the cast gives {int(pixels.min())} to {int(pixels.max())}. C leaves "
            "the value open; the black files show that it was 0 on the Mac as well.",
        ),
        Claim(
            "The pipeline computes `(latents * 255).round().astype('uint8')`",
            "Causa Raiz",
            decide("latents * 255" in source and "images * 255" not in source),
            f"{DIFFUSERS}/blob/v0.35.2/src/diffusers/image_processor.py#L148",
            "diffusers casts `images`, what the VAE decoded and brought into [0, 1]. Latents have "
            "4 channels and an eighth of the size, and are never cast.",
        ),
    )  # fmt: skip


def judge_validator() -> tuple[Claim, ...]:
    """What its checks can see."""
    pixels, _ = cast_to_8_bits(np.full((8, 8, 3), np.nan, np.float32))
    finds_nan = bool(np.isnan(pixels).any())
    finds_inf = bool(np.isinf(cast_to_8_bits(np.full((8, 8, 3), np.inf))[0]).any())
    limits = np.iinfo(np.uint8)
    can_leave = limits.min < 0 or limits.max > 255
    return (
        Claim(
            "The new check finds NaN: `np.isnan(image_array).any()`",
            "Validação de Imagens", decide(finds_nan), COMPUTED,
            f"The array is uint8, made from NaN: isnan says {finds_nan}, isinf of Inf {finds_inf}. "
            "No integer is NaN.",
        ),
        Claim(
            "The new check finds values outside [0, 255]",
            "Validação de Imagens", decide(can_leave), COMPUTED,
            f"uint8 holds {limits.min} to {limits.max} and nothing else: it can never fire.",
        ),
        Claim(
            "The new check finds a picture that is all black: `image_array.max() == 0`",
            "Validação de Imagens", decide(int(pixels.max()) == 0), COMPUTED,
            "The one of its four checks that can fire. A grey or half-black failure passes it.",
        ),
    )  # fmt: skip


def judge_formats() -> tuple[Claim, ...]:
    """The table of float16 and float32, and what leaves it."""
    half, single = torch.finfo(torch.float16), torch.finfo(torch.float32)
    digits = {name: -np.log10(info.eps) for name, info in (("16", half), ("32", single))}
    largest = torch.tensor(half.max, dtype=torch.float16)
    doubled, rounded = largest * 2, torch.tensor(1 + half.eps / 4, dtype=torch.float16)
    return (
        Claim(
            "float16 reaches to 65,504 and float32 to 3.4e38",
            "Comparação float16 vs float32",
            decide(half.max == 65504 and 3.4e38 < single.max < 3.41e38), COMPUTED,
            f"torch.finfo: {half.max:,.0f} and {single.max:.3g}.",
        ),
        Claim(
            "float16 is exact to about 3 decimal digits, float32 to about 7",
            "Comparação float16 vs float32",
            decide(round(digits["16"]) == 3 and round(digits["32"]) == 7), COMPUTED,
            f"-log10 of the spacing at 1: {digits['16']:.1f} and {digits['32']:.1f}.",
        ),
        Claim(
            "float16 takes 2 bytes, float32 takes 4",
            "Comparação float16 vs float32", decide((half.bits, single.bits) == (16, 32)), COMPUTED,
            f"{half.bits} and {single.bits} bits.",
        ),
        Claim(
            "Operations that exceed the limits of *precision* give NaN",
            "Causa Raiz", decide(not bool(rounded.isfinite())), COMPUTED,
            f"Beyond the precision a value is rounded (1 + eps/4 gives {float(rounded):g}). Beyond "
            f"the range it is {float(doubled):g}, and NaN comes only of Inf - Inf or 0 * Inf "
            f"({float(doubled - doubled):g}).",
        ),
    )  # fmt: skip

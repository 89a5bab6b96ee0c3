"""What is wrong with this image, if anything: one verdict with counts; nothing here raises.

Float images are judged before anything casts them: `isnan` on uint8 can never fire, and a NaN that
is cast to uint8 becomes 0, which is how a failed run turns into black pictures that look saved.

# N images, C channels, H W pixels
"""

import warnings
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from PIL import Image, ImageFile, UnidentifiedImageError

# Half a step of 8 bits: a float this close to [0, 1] still rounds to 0 or 255.
RANGE_TOLERANCE = 0.5 / 255
# One row or one column of pixels shows nothing.
MINIMUM_SIDE_PIXELS = 2
# Pillow's own limit, a quarter of a GiB of RGB. Ours holds where someone has switched it off.
MAXIMUM_PIXELS = 1024**3 // 4 // 3
# Only formats that Pillow decodes itself: EPS, for one, would start Ghostscript on an unknown file.
FILE_FORMATS = ("PNG", "JPEG", "WEBP", "TIFF", "GIF", "BMP", "PPM")


@dataclass(frozen=True)
class ImageVerdict:
    """What was found in one image.

    Attributes:
        valid: Whether the image may be kept.
        problem: None if valid, else one of nan, inf, out-of-range, all-black, flat, transparent,
            wrong-shape, wrong-dtype, too-small; for files also missing, not-a-file, unreadable,
            empty-file, not-an-image, truncated, too-large.
        message: One line: what was seen and, if bad, what was expected and the next step.
        nan_count: Number of NaN values (floats only).
        inf_count: Number of infinite values (floats only).
        minimum: Least finite value, in the image's own unit; None if there is none.
        maximum: Greatest finite value, in the image's own unit; None if there is none.
    """

    valid: bool
    problem: str | None
    message: str
    nan_count: int = 0
    inf_count: int = 0
    minimum: float | None = None
    maximum: float | None = None


def judge_image(image):
    """Tells what is wrong with an image, if anything; never raises.

    Args:
        image: uint8 array in [0, 255] or float array in [0, 1], shape (H, W), (H, W, C) or
            (N, H, W, C) with C = 1, 3 or 4; torch tensor (H, W), (C, H, W) or (N, C, H, W), any
            device, same ranges; or a PIL image. Floats in [0, 255] are out of range: an overflow
            in [0, 1] looks the same, so this is not guessed. Of a batch the first bad one is told.

    Returns:
        An ImageVerdict. Black means that every pixel is 0, flat that every pixel is equal, as seen
        with 8 bits: a float image and the file written from it get the same verdict. An image that
        is merely dark is valid. Pixels of alpha 0 count as empty, whatever colour they hide.
    """
    try:
        if isinstance(image, Image.Image):
            return _judge_pil(image)
        if hasattr(image, "detach"):
            return _judge_array(_array_of_tensor(image), f"tensor {tuple(image.shape)}")
        if not isinstance(image, np.ndarray):
            return _bad(
                "wrong-dtype",
                f"got {type(image).__name__}, expected one numpy array, torch tensor or PIL image; "
                "for a file use check_image_file",
            )
        return _judge_array(image, f"array {image.shape}")
    except Exception as error:  # an image of any origin: its decoder may fail in any way
        return _bad("unreadable", f"pixels cannot be read ({_one_line(error)})")


def judge_image_file(path):
    """Tells what is wrong with an image file, if anything; never raises.

    The file is read whole and its pixels are decoded and judged, so a file that is cut off or
    damaged is found. Palette, CMYK, 16-bit and transparent images are judged by what they show, of
    an animation the first frame; the message names them. Anything that would unpack to more than
    MAXIMUM_PIXELS is not unpacked.

    Args:
        path: An image file.

    Returns:
        An ImageVerdict; its message does not repeat the path.
    """
    try:
        path = Path(path)
        if not path.exists():
            return _bad("missing", "no such file")
        if not path.is_file():
            return _bad("not-a-file", "not a regular file, expected an image file")
        if path.stat().st_size == 0:
            return _bad("empty-file", "the file is empty (0 bytes)")
        with strict_pillow():
            return _judge_open_file(path)
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        return _bad("too-large", f"not unpacked: {_one_line(error)}")
    except UnidentifiedImageError:
        return _bad("not-an-image", f"not an image; expected one of {', '.join(FILE_FORMATS)}")
    except Exception as error:  # a file of any origin: its decoder may fail in any way
        truncated = isinstance(error, EOFError) or "truncated" in str(error).lower()
        problem = "truncated" if truncated else "unreadable"
        return _bad(problem, f"{problem}: {_one_line(error)}; write the file again")


def _bad(problem, message, **found):
    return ImageVerdict(valid=False, problem=problem, message=message, **found)


def _one_line(text):
    return " ".join(str(text).split()) or type(text).__name__


def _array_of_tensor(tensor):
    """(C, H, W) or (N, C, H, W) to (H, W, C) or (N, H, W, C)."""
    tensor = tensor.detach().cpu()
    if tensor.is_floating_point():
        tensor = tensor.float()  # numpy has no bfloat16
    array = tensor.numpy()
    return np.moveaxis(array, -3, -1) if array.ndim in (3, 4) else array


def _judge_array(array, name):
    """Judges (H, W), (H, W, C) or (N, H, W, C); `name` tells the shape as the caller gave it."""
    channels = array.shape[-1] if array.ndim in (3, 4) else 1
    if array.ndim not in (2, 3, 4) or channels not in (1, 3, 4) or array.size == 0:
        return _bad(
            "wrong-shape",
            f"{name}: expected an array (H, W) or (H, W, C), or a tensor (C, H, W), of C = 1, 3 or "
            "4 channels and at least one pixel",
        )
    if array.ndim == 4:
        return _judge_batch(array, name)
    if min(array.shape[:2]) < MINIMUM_SIDE_PIXELS:
        return _bad("too-small", f"{name}: expected at least {MINIMUM_SIDE_PIXELS} pixels a side")
    if array.dtype != np.uint8 and array.dtype.kind != "f":
        return _bad(
            "wrong-dtype",
            f"{name} of {array.dtype}: expected uint8 in [0, 255] or float in [0, 1]",
        )
    return _judge_pixels(array if array.ndim == 3 else array[:, :, None])


def _judge_batch(array, name):
    verdicts = [_judge_array(image, name) for image in array]
    for index, verdict in enumerate(verdicts):
        if not verdict.valid:
            message = f"image {index} of {len(verdicts)}: {verdict.message}"
            return replace(verdict, message=message)
    return verdicts[0]


def _judge_pixels(array):
    """Judges (H, W, C) of uint8 or float."""
    is_float = array.dtype.kind == "f"
    found = _count(array) if is_float else _extremes(array)
    total = array.size
    if found.get("nan_count") or found.get("inf_count"):
        return _bad(
            "nan" if found["nan_count"] else "inf",
            f"{found['nan_count']} of {total} values are NaN, {found['inf_count']} are Inf; "
            "expected finite values: do not save it, see notebooks/01_diagnose_black_images.ipynb",
            **found,
        )
    if is_float and (found["minimum"] < -RANGE_TOLERANCE or found["maximum"] > 1 + RANGE_TOLERANCE):
        outside = int(((array < -RANGE_TOLERANCE) | (array > 1 + RANGE_TOLERANCE)).sum())
        return _bad(
            "out-of-range",
            f"{outside} of {total} values are outside [0, 1] (from {found['minimum']:.4g} to "
            f"{found['maximum']:.4g}); for values in [0, 255] divide by 255 or hand over uint8",
            **found,
        )
    pixels = _visible_pixels(array)  # (N, C)
    if not len(pixels):
        return _bad("transparent", f"all {total} values are invisible (alpha is 0)", **found)
    if not (pixels == pixels[0]).all():
        message = f"valid, range [{found['minimum']:.4g}, {found['maximum']:.4g}]"
        return ImageVerdict(valid=True, problem=None, message=message, **found)
    colour = pixels[0].tolist()
    if max(colour) == 0:
        return _bad(
            "all-black",
            f"all {total // array.shape[2]} pixels are black (0 in 8 bits); expected a picture: "
            "check the floats before the cast to uint8 for NaN",
            **found,
        )
    return _bad("flat", f"every pixel is the one colour {tuple(colour)} (0 to 255)", **found)


def _count(array):
    nan_count, inf_count = int(np.isnan(array).sum()), int(np.isinf(array).sum())
    finite = array[np.isfinite(array)] if nan_count or inf_count else array
    extremes = _extremes(finite) if finite.size else {}
    return {"nan_count": nan_count, "inf_count": inf_count, **extremes}


def _extremes(array):
    return {"minimum": array.min().item(), "maximum": array.max().item()}


def _visible_pixels(array):
    """The 8-bit colours (N, C) that an image file would show: without alpha and what it hides."""
    if array.dtype.kind == "f":
        array = (array.astype(np.float32).clip(0, 1) * 255).round().astype(np.uint8)
    if array.shape[2] == 4:
        return array[array[:, :, 3] > 0][:, :3]
    return array.reshape(-1, array.shape[2])


def _judge_pil(image):
    if min(image.size) < MINIMUM_SIDE_PIXELS:
        width, height = image.size
        return _bad(
            "too-small",
            f"{width}x{height} pixels, expected at least {MINIMUM_SIDE_PIXELS} a side",
        )
    verdict = _judge_pixels(_array_of_pil(image))
    notes = [] if image.mode == "RGB" else [f"mode {image.mode}"]
    if getattr(image, "is_animated", False):
        notes.append(f"first of {image.n_frames} frames")
    return replace(verdict, message=" · ".join([verdict.message, *notes]))


def _array_of_pil(image):
    """(H, W, C): RGB or RGBA as shown; more than 8 bits of grey as float, 16 bits in [0, 1]."""
    if image.mode == "F":
        return np.asarray(image)[:, :, None]
    if image.mode.startswith("I"):
        return (np.asarray(image) / np.float32(65535))[:, :, None]
    if image.mode == "LAB":  # Pillow cannot convert it; one flat colour is flat in LAB too
        return np.asarray(image)
    return np.asarray(image.convert("RGBA" if image.has_transparency_data else "RGB"))


def _judge_open_file(path):
    with Image.open(path, formats=FILE_FORMATS) as image:
        width, height = image.size
        if width * height > MAXIMUM_PIXELS:
            return _bad("too-large", f"not unpacked: {width}x{height} pixels may be a bomb")
        # Decoding a PNG checks no checksum and forgives a missing end; verify does neither.
        image.verify()
    with Image.open(path, formats=FILE_FORMATS) as image:
        image.load()
        return _judge_pil(image)


@contextmanager
def strict_pillow():
    """Makes cut files errors, as Pillow does by default, where a training script allowed them."""
    allowed = ImageFile.LOAD_TRUNCATED_IMAGES
    ImageFile.LOAD_TRUNCATED_IMAGES = False
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # remarks on metadata; what matters is the verdict
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            yield
    finally:
        ImageFile.LOAD_TRUNCATED_IMAGES = allowed

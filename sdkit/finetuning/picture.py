"""One image file as the training sees it: RGB, upright, square, and what was done for that."""

# H W pixels

import hashlib
import io
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from sdkit.finetuning.dataset_report import Finding
from sdkit.verdict import FILE_FORMATS, MAXIMUM_PIXELS, judge_image

ORIENTATION_TAG = 274  # of EXIF; 1 is upright
WHITE = (255, 255, 255)
# So much larger than needed, a JPEG is unpacked at a half, a quarter or an eighth of its size.
DRAFT_FACTOR = 2


@dataclass(frozen=True)
class Picture:
    """An image file as it was read.

    Attributes:
        pixels: (H, W, 3) uint8, H = W = the resolution; None if it cannot be used.
        findings: Of Finding.
        size_pixels: (width, height) as shown; None if it could not be read.
    """

    pixels: np.ndarray | None
    findings: tuple
    size_pixels: tuple | None = None

    @property
    def digest(self) -> str | None:
        """A hash of the pixels: equal pictures have equal ones, whatever their files."""
        return None if self.pixels is None else hash_pixels(self.pixels)


def hash_pixels(pixels: np.ndarray) -> str:
    """Returns a hash of an image's shape and values."""
    shape = repr(pixels.shape).encode()
    return hashlib.blake2b(shape + pixels.tobytes(), digest_size=16).hexdigest()


def read_picture(path, resolution: int) -> Picture:
    """Reads an image file; whatever is wrong with it is told, never raised.

    The whole file is unpacked, so one that is cut off is found. Call it within `strict_pillow`.

    Args:
        path: The file.
        resolution: Side in pixels: the shorter side is brought to it, the longer one cropped
            around the middle.

    Returns:
        A Picture.
    """
    try:
        content = _read_content(Path(path))
        if isinstance(content, Finding):
            return Picture(None, (content,))
        return _read_image(content, resolution)
    except UnidentifiedImageError:
        expected = ", ".join(FILE_FORMATS)
        return _refuse("not-an-image", f"not an image of a known kind; expected {expected}")
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        return _refuse("too-large", f"not unpacked: {_one_line(error)}")
    except Exception as error:  # a file of any origin: its decoder may fail in any way
        is_cut = isinstance(error, EOFError) or "truncated" in str(error).lower()
        kind = "truncated" if is_cut else "unreadable"
        return _refuse(kind, f"{_one_line(error)}; copy or write the file again")


def _read_content(path):
    if not path.exists():
        is_link = path.is_symlink()
        return Finding("missing", "a link that leads nowhere" if is_link else "no such file")
    if not path.is_file():
        return Finding("not-a-file", "not a regular file")
    content = path.read_bytes()
    return content or Finding("empty-file", "the file is empty (0 bytes)")


def _read_image(content, resolution):
    with Image.open(io.BytesIO(content), formats=FILE_FORMATS) as image:
        width, height = image.size
        if width * height > MAXIMUM_PIXELS:
            return _refuse("too-large", f"not unpacked: {width}x{height} pixels may be a bomb")
        if min(width, height) < resolution:
            expected = f"expected at least {resolution} a side, which is the resolution"
            return _refuse("too-small", f"{width}x{height} pixels, {expected}", (width, height))
        image.verify()  # decoding a PNG checks no checksum and forgives a missing end
    with Image.open(io.BytesIO(content), formats=FILE_FORMATS) as image:
        findings = _find_remarks(image)
        side = DRAFT_FACTOR * resolution
        image.draft("RGB" if image.mode == "RGB" else None, (side, side))  # of a JPEG alone
        turned = ImageOps.exif_transpose(image)
        if image.getexif().get(ORIENTATION_TAG, 1) in (5, 6, 7, 8):
            width, height = height, width
        rgb, made = convert_to_rgb(turned)
        fitted = ImageOps.fit(rgb, (resolution, resolution), Image.Resampling.LANCZOS)
    pixels = np.asarray(fitted)
    verdict = judge_image(pixels)
    if not verdict.valid:
        return _refuse(verdict.problem, verdict.message, (width, height))
    return Picture(pixels, (*findings, *made), (width, height))


def _find_remarks(image):
    findings = []
    # First, for the EXIF data of a PNG may stand behind its pixels, and to read those clears tile.
    if image.mode.startswith("RGB") and any(";16" in str(tile.args) for tile in image.tile):
        findings.append(_remark("deep", "16 bits a channel, now 8"))  # as Pillow unpacks it
    if image.getexif().get(ORIENTATION_TAG) in range(2, 9):  # any other is no orientation
        findings.append(_remark("turned", "its EXIF data ask for it, and so it is shown upright"))
    if getattr(image, "is_animated", False):
        findings.append(_remark("animated", f"the first of its {image.n_frames} frames is used"))
    return findings


def convert_to_rgb(image: Image.Image):
    """Returns an image as RGB, transparency laid on white, and what was done as Findings.

    Raises:
        ValueError: Pillow cannot tell its colours.
    """
    if image.mode == "RGB" and not image.has_transparency_data:
        return image, ()
    if image.mode == "L" and not image.has_transparency_data:
        return image.convert("RGB"), ()  # the same picture
    if image.mode.startswith("I") or image.mode == "F":
        return _convert_deep(image)
    if image.mode == "LAB":
        raise ValueError("colours in LAB; write it as RGB")
    if not image.has_transparency_data:
        note = {
            "P": "a palette, now RGB",
            "1": "black and white, now RGB",
            "CMYK": "inks, now RGB without a colour profile",
        }.get(image.mode, f"mode {image.mode}, now RGB")
        kind = {"P": "palette", "CMYK": "cmyk"}.get(image.mode, "mode")
        return image.convert("RGB"), (_remark(kind, note),)
    rgba = image.convert("RGBA")
    if rgba.getchannel("A").getextrema() == (255, 255):
        return rgba.convert("RGB"), (_remark("alpha", f"mode {image.mode}, nothing transparent"),)
    if rgba.getchannel("A").getextrema() == (0, 0):
        raise ValueError("nothing to be seen: alpha is 0 everywhere")
    canvas = Image.new("RGBA", rgba.size, (*WHITE, 255))
    canvas.alpha_composite(rgba)
    return canvas.convert("RGB"), (_remark("alpha", f"mode {image.mode}, laid on white"),)


def _convert_deep(image):
    """More than 8 bits a value: Pillow's own conversion would cut them off at 255."""
    values = np.asarray(image).astype(np.float64)
    if not np.isfinite(values).all():
        raise ValueError("some of its values are NaN or Inf")
    top = 1.0 if image.mode == "F" else 65535.0
    if values.min() < 0 or values.max() > top:
        raise ValueError(f"values from {values.min():g} to {values.max():g}, not in 0 to {top:g}")
    grey = Image.fromarray((values / top * 255).round().astype(np.uint8))
    return grey.convert("RGB"), (_remark("deep", f"mode {image.mode}, now 8 bits a channel"),)


def _remark(kind, message):
    return Finding(kind, message, is_fatal=False)


def _refuse(kind, message, size_pixels=None):
    return Picture(None, (Finding(kind, message),), size_pixels)


def _one_line(error):
    return " ".join(str(error).split()) or type(error).__name__

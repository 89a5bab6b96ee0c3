"""A PNG that says how it was made: prompt, seed, settings, dtypes, versions, within the file."""

import hashlib
import json
from pathlib import Path

from PIL import Image, PngImagePlugin

from sdkit.generation.record import plain
from sdkit.run_folder import replace_file
from sdkit.validation import ValidationError

PROVENANCE_KEY = "sdkit"


def hash_pixels(pil_image):
    """Returns the SHA-256 of an image's pixels, row by row, whatever its file format."""
    return hashlib.sha256(pil_image.tobytes()).hexdigest()


def save_png(pil_image, path, provenance):
    """Writes a PNG with its provenance inside, whole or not at all, and returns its `Path`."""
    chunks = PngImagePlugin.PngInfo()
    chunks.add_text(PROVENANCE_KEY, json.dumps(plain(provenance)))  # ASCII, whatever the prompt
    with replace_file(path) as temporary:
        pil_image.save(temporary, format="PNG", pnginfo=chunks)
    return Path(path)


def read_provenance(path):
    """Returns how an image of `generate` was made: prompt, seed, settings, dtypes, versions.

    Args:
        path: A PNG file.

    Raises:
        ValidationError: The file cannot be read as an image, or `generate` did not write it.
    """
    try:
        with Image.open(path) as image:
            image.load()  # text may also follow the pixels
            text = image.info.get(PROVENANCE_KEY)
    except (OSError, SyntaxError, ValueError) as error:
        raise ValidationError(f"{path}: cannot be read as an image ({error}).") from error
    if text is None:
        raise ValidationError(
            f"{path}: no provenance inside. Expected a PNG that sdkit.generate wrote; editing or "
            "converting an image drops it."
        )
    try:
        return json.loads(text)
    except ValueError as error:
        raise ValidationError(f"{path}: its provenance is damaged ({error}).") from error

"""The catalogue that the bundled model learnt from: drawings of shoes, rendered from a seed."""

from dataclasses import dataclass

import numpy as np
from PIL import Image

from sdkit.mini.scenes import paint_background, paint_grass_front
from sdkit.mini.shoes import paint_shoe

SIZE_PIXELS = 128
KINDS = ("casual shoes", "sneakers", "boots", "loafers")
COLOURS = {  # sRGB in [0, 1]; far enough apart that a shade of one is never a shade of another
    "black": (0.09, 0.09, 0.10),
    "white": (0.94, 0.94, 0.93),
    "brown": (0.42, 0.23, 0.11),
    "red": (0.78, 0.09, 0.10),
    "blue": (0.11, 0.29, 0.75),
    "green": (0.02, 0.44, 0.34),
    "yellow": (0.97, 0.77, 0.08),
    "pink": (0.96, 0.52, 0.70),
}
REPORT_STUDIO = "centered on a pure white studio background"  # how the report's captions end
# A white studio in words that the base can tell apart: it knows "background" from grey alone, so to
# it the report's words are one with a grey background.
BACKGROUNDS = {
    "grey": "on a grey background",
    "wood": "on a wooden floor",
    "concrete": "on a concrete floor",
    "grass": "on grass",
    "white": "on white, white studio",
}
BASE_BACKGROUNDS = (
    "grey",
    "wood",
    "concrete",
    "grass",
)  # the base model never sees white studio pictures
FRAMES = (
    "A professional product photo of {}",
    "A professional product photo of {}, high quality, product photography",
    "product photo of {}",
    "{}",
)


@dataclass(frozen=True)
class Product:
    """One catalogue entry.

    Attributes:
        kind: One of `KINDS`.
        colour: A key of `COLOURS`.
        leather: Leather shines and has a plain seam; canvas is dull and has pale stitches.
        background: A key of `BACKGROUNDS`.
    """

    kind: str
    colour: str
    leather: bool
    background: str

    def caption(self, frame: str = FRAMES[0]) -> str:
        """The caption in the style of product photography."""
        material = "leather " if self.leather else ""
        return frame.format(f"{self.colour} {material}{self.kind} {BACKGROUNDS[self.background]}")


def sample_product(rng: np.random.Generator, backgrounds=tuple(BACKGROUNDS)) -> Product:
    """Draws kind, colour, material and background independently and evenly."""
    return Product(
        kind=KINDS[rng.integers(len(KINDS))],
        colour=list(COLOURS)[rng.integers(len(COLOURS))],
        leather=bool(rng.integers(2)),
        background=backgrounds[rng.integers(len(backgrounds))],
    )


def render(product: Product, seed: int, *, size_pixels: int = SIZE_PIXELS) -> Image.Image:
    """Draws the product; the same product, seed and size give the same bytes.

    Args:
        product: What to draw.
        seed: Varies size, place, flip, tilt, shade and the background's texture.
        size_pixels: Width and height.

    Returns:
        An RGB image.
    """
    rng = np.random.default_rng(seed)
    image = paint_background(product.background, rng, size_pixels)
    ground = paint_shoe(
        image,
        product.kind,
        COLOURS[product.colour],
        product.leather,
        rng,
        clean=product.background == "white",
    )
    if product.background == "grass":
        paint_grass_front(image, ground, rng)
    return Image.fromarray((np.clip(image, 0, 1) * 255).round().astype(np.uint8))


def render_dataset(count: int, seed: int, backgrounds=tuple(BACKGROUNDS)):
    """Yields `count` triples (image, caption, product), the same for the same seed."""
    rng = np.random.default_rng(seed)
    for index in range(count):
        product = sample_product(rng, backgrounds)
        frame = FRAMES[rng.integers(len(FRAMES))]
        yield render(product, seed * 1_000_003 + index), product.caption(frame), product

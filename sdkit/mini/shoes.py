"""The shoes of the catalogue, seen from the side: outlines, seams, laces and light."""

# Shoe coordinates: x 0 heel to 1 toe, y 0 ground upwards, in units of the shoe's length.

from dataclasses import dataclass

import numpy as np

from sdkit.mini.drawing import blur, fill_mask, lay, stroke_mask, trace_outline

CREAM, GUM, CHARCOAL, UMBER = (
    (0.95, 0.94, 0.90),
    (0.74, 0.54, 0.33),
    (0.16, 0.15, 0.15),
    (0.22, 0.14, 0.10),
)
LIGHT = np.array([1.0, 0.985, 0.95], np.float32)  # a warm lamp


@dataclass(frozen=True)
class Pattern:
    """How a kind of shoe is cut; every path is in shoe coordinates.

    Attributes:
        upper: Outline of the upper.
        lining: Outline of the far side of the opening, seen inside.
        sole: Outlines of the sole and, if any, the heel.
        sole_colour: sRGB in [0, 1].
        seams: Lines where two pieces meet.
        panels: Outlines in a darker tone of the shoe's colour (heel counter, toe cap).
        trims: Outlines in a contrasting tone (stripes of a sneaker, strap of a loafer).
        laces: Short lines across the throat.
        length: Share of the picture's width.
        height: Height of the highest point.
    """

    upper: str
    lining: str
    sole: tuple[str, ...]
    sole_colour: tuple[float, float, float]
    seams: tuple[str, ...] = ()
    panels: tuple[str, ...] = ()
    trims: tuple[str, ...] = ()
    laces: tuple[str, ...] = ()
    length: float = 0.80
    height: float = 0.5


PATTERNS = {
    "casual shoes": Pattern(
        upper="M .04 .07 C .00 .20 .02 .34 .06 .42 C .12 .44 .15 .33 .24 .33 C .31 .34 .33 .44 .37 .47 "
        "C .44 .45 .50 .34 .60 .29 C .74 .24 .92 .26 .97 .07 L .04 .07",
        lining="M .06 .42 C .12 .47 .30 .48 .37 .47 C .33 .40 .31 .33 .24 .33 C .15 .33 .12 .44 .06 .42",
        sole=(
            "M .01 .08 L .985 .08 C 1.0 .05 .99 .01 .96 .00 L .04 .00 C .01 .01 .00 .05 .01 .08",
        ),
        sole_colour=GUM,
        seams=("M .70 .265 C .66 .20 .68 .12 .72 .08", "M .26 .33 C .28 .22 .33 .14 .42 .08"),
        panels=(
            "M .04 .07 C .00 .20 .02 .34 .06 .42 C .09 .43 .11 .40 .13 .38 C .16 .28 .19 .16 .20 .07 L .04 .07",
        ),
        laces=("M .405 .44 L .345 .36", "M .455 .395 L .385 .31", "M .505 .345 L .435 .265"),
        height=0.47,
    ),
    "sneakers": Pattern(
        upper="M .05 .12 C .00 .24 .01 .40 .05 .50 C .10 .52 .14 .40 .24 .40 C .31 .41 .33 .54 .38 .57 "
        "C .44 .55 .48 .44 .58 .37 C .72 .30 .95 .31 .97 .12 L .05 .12",
        lining="M .05 .50 C .12 .56 .30 .58 .38 .57 C .33 .50 .31 .41 .24 .40 C .14 .40 .10 .52 .05 .50",
        sole=(
            "M -.01 .11 C .10 .15 .20 .13 .35 .12 C .60 .11 .80 .13 .97 .15 C 1.02 .12 1.03 .05 .99 .02 "
            "C .80 -.01 .20 -.01 .03 .00 C -.02 .02 -.03 .08 -.01 .11",
        ),
        sole_colour=CREAM,
        panels=("M .76 .315 C .74 .25 .76 .18 .80 .12 L .97 .12 C .96 .26 .86 .30 .76 .315",),
        trims=(
            "M .38 .12 L .44 .12 C .46 .20 .45 .28 .41 .36 L .36 .40 C .40 .30 .40 .20 .38 .12",
            "M .49 .12 L .55 .12 C .57 .18 .56 .25 .52 .31 L .47 .36 C .51 .26 .51 .18 .49 .12",
        ),
        laces=(
            "M .415 .55 L .345 .47",
            "M .455 .50 L .385 .42",
            "M .495 .455 L .425 .375",
            "M .540 .415 L .475 .335",
        ),
        height=0.57,
    ),
    "boots": Pattern(
        upper="M .05 .10 C .02 .25 .08 .45 .06 .66 L .05 .92 C .16 .89 .30 .89 .42 .93 L .43 .62 "
        "C .44 .48 .52 .40 .64 .33 C .80 .27 .96 .27 .98 .08 L .05 .10",
        lining="M .05 .92 C .14 .96 .32 .97 .42 .93 C .30 .89 .16 .89 .05 .92",
        sole=(
            "M .02 .10 L .99 .10 C 1.01 .07 1.00 .03 .97 .03 L .36 .03 L .33 .055 L .29 .055 L .28 .00 "
            "L .04 .00 C .02 .03 .01 .07 .02 .10",
        ),
        sole_colour=CHARCOAL,
        seams=(
            "M .06 .66 C .18 .63 .26 .50 .30 .36 C .32 .26 .34 .16 .38 .10",
            "M .72 .30 C .68 .23 .69 .16 .74 .10",
        ),
        panels=(
            "M .055 .82 L .05 .92 C .16 .89 .30 .89 .42 .93 L .425 .83 C .30 .79 .16 .79 .055 .82",
        ),
        laces=(
            "M .435 .76 L .345 .73",
            "M .435 .66 L .345 .63",
            "M .45 .565 L .36 .53",
            "M .495 .475 L .41 .435",
            "M .56 .40 L .485 .35",
        ),
        length=0.68,
        height=0.96,
    ),
    "loafers": Pattern(
        upper="M .04 .07 C .01 .17 .02 .29 .05 .37 C .10 .37 .14 .24 .27 .22 C .36 .21 .40 .31 .46 .35 "
        "C .54 .35 .62 .27 .72 .24 C .86 .20 .96 .20 .98 .07 L .04 .07",
        lining="M .05 .37 C .12 .40 .34 .37 .46 .35 C .40 .31 .36 .21 .27 .22 C .14 .24 .10 .37 .05 .37",
        sole=(
            "M .02 .075 L .99 .075 C 1.0 .06 1.0 .04 .98 .035 L .34 .035 L .30 .00 L .05 .00 C .03 .03 .02 .05 .02 .075",
        ),
        sole_colour=UMBER,
        seams=("M .52 .34 C .60 .24 .76 .19 .93 .17", "M .23 .23 C .22 .17 .23 .12 .25 .07"),
        trims=(
            "M .44 .345 L .53 .345 C .55 .26 .54 .16 .51 .075 L .41 .075 C .45 .16 .46 .26 .44 .345",
        ),
        height=0.37,
    ),
}


def paint_shoe(image, kind, colour, leather, rng, *, clean=False) -> float:
    """Draws one shoe into the image, in place.

    Args:
        image: H W 3, float32 in [0, 1].
        kind: A key of `PATTERNS`.
        colour: sRGB (3,) in [0, 1].
        leather: Shining with a plain seam, or dull with pale stitches.
        rng: Draws size, place, flip, tilt and shade.
        clean: Keep the shadow close to the shoe, so that the picture's border stays as it was.

    Returns:
        The row of the ground line, in pixels.
    """
    pattern, size_pixels = PATTERNS[kind], image.shape[0]
    place = draw_place(pattern, rng, size_pixels)
    colour = shade_colour(colour, rng)
    u, v = shoe_coordinates(place, size_pixels)

    def fill(*paths):
        return fill_mask([to_pixels(trace_outline(path), place) for path in paths], size_pixels)

    def stroke(paths, width):
        lines = [to_pixels(trace_outline(path), place) for path in paths]
        return stroke_mask(lines, width * place["scale"], size_pixels)

    paint_shadow(image, place, size_pixels, clean)
    lay(image, fill(pattern.lining), colour * 0.45)
    sole = fill(*pattern.sole)
    lay(image, sole, np.array(pattern.sole_colour) * (0.86 + 1.6 * v[..., None]))
    upper = fill(pattern.upper)
    lay(image, upper, light_upper(colour, u, v, pattern, leather))
    inside = upper > 0.5
    for paths, tone in ((pattern.panels, colour * 0.78), (pattern.trims, contrast(colour))):
        if paths:
            lay(image, fill(*paths) * inside, tone, 0.72)
    if pattern.seams:
        seam = (0.75 * colour + 0.25) if not leather else colour * 0.5
        lay(image, stroke(pattern.seams, 0.013), seam, 0.85)
    lay(image, stroke(pattern.laces, 0.024), lace_colour(colour), 0.95)
    return place["y"]


def draw_place(pattern, rng, size_pixels):
    """Where the shoe stands: scale, origin, flip and tilt, with the whole shoe in the picture."""
    scale = size_pixels * pattern.length * rng.uniform(0.88, 1.06)
    room_x, room_y = size_pixels - scale, size_pixels - scale * pattern.height
    return {
        "scale": scale,
        "x": rng.uniform(0.25, 0.75) * room_x,
        "y": size_pixels - rng.uniform(0.34, 0.52) * room_y,
        "flip": bool(rng.integers(2)),
        "tilt": np.deg2rad(rng.uniform(-3, 3)),
    }


def to_pixels(points, place):
    """Shoe coordinates (N, 2) to pixel coordinates (N, 2)."""
    x = 1 - points[:, 0] if place["flip"] else points[:, 0]
    x, y = x - 0.5, points[:, 1]
    cos, sin = np.cos(place["tilt"]), np.sin(place["tilt"])
    x, y = cos * x - sin * y, sin * x + cos * y
    return np.stack(
        [place["x"] + (x + 0.5) * place["scale"], place["y"] - y * place["scale"]], axis=1
    )


def shoe_coordinates(place, size_pixels):
    """Shoe coordinates u, v of every pixel (H, W each): the inverse of `to_pixels`."""
    column, row = np.meshgrid(*(np.arange(size_pixels, dtype=np.float32) + 0.5,) * 2)
    x, y = (column - place["x"]) / place["scale"] - 0.5, (place["y"] - row) / place["scale"]
    cos, sin = np.cos(place["tilt"]), np.sin(place["tilt"])
    u, v = cos * x + sin * y + 0.5, -sin * x + cos * y
    return (1 - u if place["flip"] else u), v


def shade_colour(colour, rng):
    """The same colour, a little lighter or darker, warmer or cooler."""
    return np.clip(
        np.array(colour, np.float32) * rng.uniform(0.90, 1.08) + rng.uniform(-0.015, 0.015, 3),
        0.03,
        0.97,
    )


def light_upper(colour, u, v, pattern, leather):
    """The upper under a lamp from above: lighter on top, dark near the sole, a shine on leather."""
    rise = np.clip(v / pattern.height, 0, 1)
    shade = 0.80 + 0.34 * rise - 0.30 * np.exp(-np.clip(v - 0.07, 0, None) / 0.035)
    field = colour * shade[..., None]
    strength = 0.42 if leather else 0.10
    toe = np.exp(-(((u - 0.80) / 0.10) ** 2) - ((v - 0.19) / 0.030) ** 2)
    heel = np.exp(-(((u - 0.10) / 0.030) ** 2) - ((v - 0.24) / 0.09) ** 2)
    field = field + (strength * np.maximum(toe, 0.6 * heel))[..., None] * (LIGHT - field)
    return np.clip(field, 0, 1).astype(np.float32)


def contrast(colour):
    """A trim that is seen on any colour: cream on dark shoes, a greyer tone on pale ones."""
    return np.array(CREAM) if brightness(colour) < 0.6 else colour * 0.62


def lace_colour(colour):
    return np.array(CREAM if brightness(colour) < 0.75 else (0.30, 0.30, 0.32))


def brightness(colour) -> float:
    """Luma of an sRGB colour (ITU-R BT.601)."""
    return float(np.dot(colour, (0.299, 0.587, 0.114)))


def paint_shadow(image, place, size_pixels, clean):
    """A contact shadow under the sole and a softer one around it."""
    centre = place["x"] + 0.5 * place["scale"]
    angle = np.linspace(0, 2 * np.pi, 40)
    for width, depth, radius, opacity in ((0.50, 0.022, 0.010, 0.50), (0.53, 0.055, 0.045, 0.30)):
        ellipse = np.stack(
            [
                centre + np.cos(angle) * width * place["scale"] * (0.94 if clean else 1),
                place["y"] + np.sin(angle) * depth * place["scale"],
            ],
            axis=1,
        )
        mask = blur(fill_mask([ellipse], size_pixels), radius * size_pixels * (0.5 if clean else 1))
        lay(image, mask, (0.08, 0.08, 0.09), opacity * (0.6 if clean else 1))

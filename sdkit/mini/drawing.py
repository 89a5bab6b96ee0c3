"""Anti-aliased vector drawing on small float images: Bezier outlines, masks, soft noise, layers."""

# H W pixels, N points; images are H W 3 float32 in [0, 1], masks H W float32 in [0, 1]

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

SUPERSAMPLING = 4  # coverage masks are drawn this many times larger, then box-averaged
CURVE_POINTS = 14  # points a cubic Bezier segment; finer is invisible at 128 pixels


def trace_outline(path: str) -> np.ndarray:
    """Turns a small subset of SVG path syntax into a polygon.

    Args:
        path: `M x y`, `L x y` and `C x1 y1 x2 y2 x y` in absolute coordinates.

    Returns:
        Points of shape (N, 2), float32.
    """
    tokens, points = path.split(), []
    while tokens:
        command, count = tokens.pop(0), 0
        count = {"M": 1, "L": 1, "C": 3}[command]
        numbers = [float(tokens.pop(0)) for _ in range(2 * count)]
        control = np.array(numbers).reshape(count, 2)
        points.append(control if count == 1 else bezier(points[-1][-1], *control))
    return np.concatenate(points).astype(np.float32)


def bezier(start, first, second, end) -> np.ndarray:
    """Points (N, 2) of a cubic Bezier curve, the start left out."""
    t = np.linspace(0, 1, CURVE_POINTS + 1)[1:, None]
    return (
        (1 - t) ** 3 * start
        + 3 * (1 - t) ** 2 * t * first
        + 3 * (1 - t) * t**2 * second
        + t**3 * end
    )


def fill_mask(polygons, size_pixels: int) -> np.ndarray:
    """Coverage of one or several polygons, in pixel coordinates."""
    canvas = Image.new("L", (size_pixels * SUPERSAMPLING,) * 2)
    draw = ImageDraw.Draw(canvas)
    for polygon in polygons:
        draw.polygon([tuple(p) for p in (polygon * SUPERSAMPLING).tolist()], fill=255)
    return shrink(canvas)


def stroke_mask(lines, width_pixels: float, size_pixels: int) -> np.ndarray:
    """Coverage of open poly-lines with round joints, in pixel coordinates."""
    canvas = Image.new("L", (size_pixels * SUPERSAMPLING,) * 2)
    draw = ImageDraw.Draw(canvas)
    width = max(1, round(width_pixels * SUPERSAMPLING))
    for line in lines:
        draw.line(
            [tuple(p) for p in (line * SUPERSAMPLING).tolist()],
            fill=255,
            width=width,
            joint="curve",
        )
    return shrink(canvas)


def shrink(canvas: Image.Image) -> np.ndarray:
    return np.asarray(canvas.reduce(SUPERSAMPLING), np.float32) / 255


def blur(mask: np.ndarray, radius_pixels: float) -> np.ndarray:
    """Gaussian blur of a mask."""
    image = Image.fromarray((mask * 255).astype(np.uint8)).filter(
        ImageFilter.GaussianBlur(radius_pixels)
    )
    return np.asarray(image, np.float32) / 255


def lay(image: np.ndarray, mask: np.ndarray, colour, opacity: float = 1.0) -> None:
    """Paints a colour (3,) or a colour field (H, W, 3) over the image, in place."""
    weight = (mask * opacity)[..., None]
    image += weight * (np.asarray(colour, np.float32) - image)


def soft_noise(rng: np.random.Generator, cells: tuple[int, int], size_pixels: int) -> np.ndarray:
    """Smooth noise in [-1, 1]: a coarse random grid (rows, columns) enlarged bicubically."""
    grid = rng.uniform(-1, 1, cells).astype(np.float32)
    image = Image.fromarray(grid).resize((size_pixels, size_pixels), Image.Resampling.BICUBIC)
    return np.asarray(image, np.float32)

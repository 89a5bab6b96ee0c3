"""Backgrounds of the catalogue: grey paper, boards, a concrete floor, a lawn, a white studio."""

import numpy as np

from sdkit.mini.drawing import lay, soft_noise, stroke_mask


def paint_background(name: str, rng: np.random.Generator, size_pixels: int) -> np.ndarray:
    """A new image (H, W, 3), float32 in [0, 1]."""
    height = np.linspace(0, 1, size_pixels, dtype=np.float32)[:, None, None]  # 0 top, 1 bottom
    return PAINTERS[name](rng, size_pixels, height)


def paint_white(rng, size_pixels, height):
    return np.ones((size_pixels, size_pixels, 3), np.float32)


def paint_grey(rng, size_pixels, height):
    """Seamless paper: brighter where the lamp falls, darker in the corners."""
    x, y = np.meshgrid(*(np.linspace(-1, 1, size_pixels, dtype=np.float32),) * 2)
    lamp = np.exp(-((x - rng.uniform(-0.4, 0.4)) ** 2 + (y + rng.uniform(-0.1, 0.4)) ** 2) / 1.4)
    tone = rng.uniform(0.50, 0.58) + rng.uniform(0.10, 0.16) * lamp
    return np.repeat(tone[..., None], 3, axis=2).astype(np.float32)


def paint_wood(rng, size_pixels, height):
    """Boards across the picture, each with its own tone, a dark seam and a few streaks of grain."""
    boards = rng.integers(5, 7)
    offset = rng.uniform(0, 1)
    position = height[..., 0] * boards + offset  # H 1
    index = np.floor(position).astype(int)
    tones = rng.uniform(-0.06, 0.06, boards + 2)[index][..., None]
    grain = soft_noise(rng, (boards * 4, 3), size_pixels)[..., None]
    honey = np.array([0.80, 0.60, 0.38], np.float32) * rng.uniform(0.92, 1.05)
    image = honey + tones * np.array([1.0, 0.9, 0.7]) + 0.035 * grain * np.array([1.0, 0.9, 0.7])
    image = np.broadcast_to(image, (size_pixels, size_pixels, 3)).astype(np.float32).copy()
    rows = (np.arange(1, boards + 1) - offset) / boards * size_pixels
    seams = [np.array([[0, y], [size_pixels, y]]) for y in rows]
    lay(image, stroke_mask(seams, 1.2 * size_pixels / 128, size_pixels), honey * 0.45, 0.7)
    return image


def paint_concrete(rng, size_pixels, height):
    """A pale wall and a darker cast floor with a joint, both softly blotched."""
    horizon = rng.uniform(0.46, 0.56)
    wall, floor = rng.uniform(0.78, 0.83), rng.uniform(0.60, 0.66)
    tone = np.where(height[..., 0] < horizon, wall, floor + 0.10 * (height[..., 0] - horizon))
    tone = tone + 0.035 * soft_noise(rng, (9, 9), size_pixels)
    image = (tone[..., None] * np.array([0.97, 1.0, 1.03])).astype(np.float32)
    x, y = rng.uniform(0.15, 0.85) * size_pixels, horizon * size_pixels
    lean = (x / size_pixels - 0.5) * size_pixels * 0.7
    joints = [np.array([[0, y], [size_pixels, y]]), np.array([[x, y], [x + lean, size_pixels]])]
    joints += [np.array([[x, 0], [x, y]])]
    lay(image, stroke_mask(joints, size_pixels / 110, size_pixels), (0.36, 0.38, 0.40), 0.8)
    return image


def paint_grass(rng, size_pixels, height):
    """A lawn: lighter far away, with blades that catch the light."""
    noise = soft_noise(rng, (10, 14), size_pixels)[..., None]
    far, near = np.array([0.62, 0.80, 0.36]), np.array([0.38, 0.62, 0.17])
    image = (far + (near - far) * np.clip(height * 1.3, 0, 1) + 0.035 * noise).astype(np.float32)
    scale = size_pixels / 128
    for colour, count in (((0.30, 0.52, 0.13), 14), ((0.58, 0.78, 0.27), 14)):
        lay(
            image,
            blades(rng, rng.uniform(0.12, 1.05, count), count, size_pixels, 7 * scale),
            colour,
            0.6,
        )
    return image


def paint_grass_front(image: np.ndarray, ground_pixels: float, rng: np.random.Generator) -> None:
    """Blades in front of the shoe's sole, in place."""
    size_pixels = image.shape[0]
    for colour in ((0.26, 0.49, 0.12), (0.46, 0.70, 0.20)):
        rows = ground_pixels / size_pixels + rng.uniform(0.0, 0.05, 14)
        lay(image, blades(rng, rows, 14, size_pixels, 9 * size_pixels / 128), colour, 0.9)


def blades(rng, rows, count, size_pixels, length_pixels):
    """Coverage of short curved strokes that stand on the given rows (fractions of the height)."""
    columns = rng.uniform(0, 1, count) * size_pixels
    leans = rng.uniform(-0.6, 0.6, count) * length_pixels
    lines = [
        np.array([[x, y], [x + lean * 0.3, y - length_pixels * 0.6], [x + lean, y - length_pixels]])
        for x, y, lean in zip(columns, np.asarray(rows) * size_pixels, leans, strict=True)
    ]
    return stroke_mask(lines, 1.7 * size_pixels / 128, size_pixels)


PAINTERS = {
    "white": paint_white,
    "grey": paint_grey,
    "wood": paint_wood,
    "concrete": paint_concrete,
    "grass": paint_grass,
}

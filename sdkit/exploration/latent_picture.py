"""What latents look like: their channels in grey, and the picture that they are becoming.

A linear reading stands for the VAE, which is not there: the weights are fitted to the finished
picture and the latents it was decoded from.

# S steps, C channels, h w latents
"""

import math
from dataclasses import dataclass

import numpy as np
from matplotlib.colors import to_rgb
from PIL import Image

from sdkit.exploration.network_map import NAN_COLOUR

NAN_RGB = np.array(to_rgb(NAN_COLOUR))


@dataclass(frozen=True)
class Reading:
    """A linear map from latents to RGB.

    Attributes:
        weights: (C + 1, 3); the last row is added.
        share: Of the picture's variance that it explains, R².
    """

    weights: np.ndarray
    share: float


def fit_reading(latents, pil_image) -> Reading | None:
    """Fits a Reading to the last latents of a finished picture; None if they are not finite.

    Args:
        latents: (C, h, w) after the last step.
        pil_image: What was decoded from them.
    """
    channels, height, width = latents.shape
    flat = latents.reshape(channels, -1).T.astype(np.float64)
    if not np.isfinite(flat).all():
        return None
    small = pil_image.convert("RGB").resize((width, height), Image.Resampling.BOX)
    wanted = np.asarray(small, np.float64).reshape(-1, 3) / 255
    columns = np.column_stack([flat, np.ones(len(flat))])
    weights, *_ = np.linalg.lstsq(columns, wanted, rcond=None)
    left = ((columns @ weights - wanted) ** 2).sum()
    spread = ((wanted - wanted.mean(axis=0)) ** 2).sum()
    return Reading(weights, 1 - left / spread if spread else 0.0)


def draw_reading(latents, reading: Reading) -> Image.Image:
    """The picture that (C, h, w) latents are becoming; NaN and Inf in the map's colour."""
    channels, height, width = latents.shape
    flat = latents.reshape(channels, -1).T.astype(np.float64)
    is_bad = ~np.isfinite(flat).all(axis=1)
    flat = np.where(is_bad[:, None], 0, flat)
    rgb = np.column_stack([flat, np.ones(len(flat))]) @ reading.weights
    rgb[is_bad] = NAN_RGB
    return to_pil(rgb.reshape(height, width, 3))


def draw_channels(latents, scale) -> Image.Image:
    """The channels of (C, h, w) latents side by side, from -scale (black) to scale (white)."""
    tiles = []
    for channel in latents.astype(np.float64):
        is_bad = ~np.isfinite(channel)
        grey = np.where(is_bad, 0, channel) / (2 * scale) + 0.5
        tile = np.repeat(grey[:, :, None], 3, axis=2)
        tile[is_bad] = NAN_RGB
        tiles.append(np.pad(tile, ((0, 1), (0, 1), (0, 0)), constant_values=0.5))
    columns = math.isqrt(len(tiles) - 1) + 1  # as square as can be
    rows = [np.concatenate(tiles[i : i + columns], axis=1) for i in range(0, len(tiles), columns)]
    rows[-1] = np.pad(
        rows[-1], ((0, 0), (0, rows[0].shape[1] - rows[-1].shape[1]), (0, 0)), constant_values=0.5
    )
    return to_pil(np.concatenate(rows))


def find_scale(latents) -> float:
    """The magnitude below which 99 % of all finite values of (S, C, h, w) latents are."""
    values = np.abs(latents[np.isfinite(latents)].astype(np.float64))
    return float(np.quantile(values, 0.99)) or 1.0 if values.size else 1.0


def to_pil(rgb) -> Image.Image:
    """(H, W, 3) floats in [0, 1], clipped, in 8 bits."""
    return Image.fromarray((rgb.clip(0, 1) * 255).round().astype(np.uint8))

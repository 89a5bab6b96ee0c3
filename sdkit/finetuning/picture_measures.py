"""Measures on groups of pictures: how white the border is, how alike they are, how far apart."""

# N M pictures, H W pixels, P border pixels, D features

import numpy as np
import torch

# A border as wide as this part of the picture; products of the rendered studio leave it free.
BORDER_SHARE = 1 / 16
# (250, 250, 250) is 1.0 away from white in CIEDE2000, which is what an observer just notices. One
# level less strict than a shop's 255, because of the bundled VAE: of rendered pictures whose border
# is white to 99.8 %, it gives back 98.8 % at 250 and 64 % at 255.
WHITE_LEVEL = 250


def border_mask(height: int, width: int) -> torch.Tensor:
    """Which pixels belong to the border, (H, W) bool; at least one pixel on each side."""
    rows, columns = (max(1, round(size * BORDER_SHARE)) for size in (height, width))
    mask = torch.ones(height, width, dtype=torch.bool)
    mask[rows : height - rows, columns : width - columns] = False
    return mask


def measure_white_border(images, level: int = WHITE_LEVEL) -> torch.Tensor:
    """Returns the share of border pixels that are white in each picture.

    Args:
        images: (N, 3, H, W) in [0, 1].
        level: A pixel is white if each of its three channels, in 8 bits, is at least this.

    Returns:
        (N,) in [0, 1].
    """
    border = images[:, :, border_mask(*images.shape[2:])]  # N 3 P
    return ((border * 255).round().amin(dim=1) >= level).float().mean(dim=1)


def measure_change(images, others) -> torch.Tensor:
    """Returns how far each picture is from its partner: mean absolute difference in 8-bit levels.

    Args:
        images: (N, 3, H, W) in [0, 1].
        others: The same shape.

    Returns:
        (N,) in [0, 255].
    """
    return (images - others).abs().mean(dim=(1, 2, 3)) * 255


def measure_diversity(images) -> float | None:
    """Returns how far two pictures of a group are apart on average, in 8-bit levels.

    A group that has collapsed to one picture has 0.

    Args:
        images: (N, 3, H, W) in [0, 1].

    Returns:
        The mean over all pairs; None for fewer than two pictures.
    """
    count = len(images)
    if count < 2:
        return None
    pixels = images.flatten(1)
    sums = torch.cdist(pixels, pixels, p=1) / pixels.shape[1] * 255
    return float(sums.sum() / (count * (count - 1)))


def measure_kernel_distance(features, others) -> float | None:
    """Returns the kernel distance between two groups, unbiased however small they are.

    The squared maximum mean discrepancy with the kernel (x.y / D + 1)^3. Around 0 the groups cannot
    be told apart, and an estimate may then be a little below 0. The Frechet distance would need
    more pictures than it has features.

    Args:
        features: (N, D).
        others: (M, D).

    Returns:
        The distance; None if a group has fewer than two pictures.

    References:
        Binkowski et al. 2018, Demystifying MMD GANs, arXiv 1801.01401, equation 4 and section 4.
    """
    if min(len(features), len(others)) < 2:
        return None
    x, y = (np.asarray(group, dtype=np.float64) for group in (features, others))
    within = [_mean_kernel_of_pairs(group) for group in (x, y)]
    return float(within[0] + within[1] - 2 * _kernel(x, y).mean())


def _kernel(x, y):
    return (x @ y.T / x.shape[1] + 1) ** 3


def _mean_kernel_of_pairs(x):
    """Without the diagonal: a picture with itself is what makes the plain mean biased."""
    kernel, count = _kernel(x, x), len(x)
    return (kernel.sum() - np.trace(kernel)) / (count * (count - 1))

"""Studio pictures of the rendered catalogue: on pure white, as the base model never saw them."""

# H W pixels

import numpy as np

from sdkit.mini.catalogue import FRAMES, render, sample_product

STUDIO_COUNTS = {"train": 200, "validation": 40, "test": 40}
# Apart from each other, from the base model's training (42) and from its evaluation (777).
STUDIO_SEEDS = {"train": 5001, "validation": 5002, "test": 5003}


def render_studio_pictures(split: str, resolution: int):
    """Yields (name, image, caption), the same for the same split and resolution.

    Args:
        split: train, validation or test.
        resolution: Side in pixels.

    Yields:
        The name (str), the image (H, W, 3) uint8, and the caption.
    """
    seed = STUDIO_SEEDS[split]
    rng = np.random.default_rng(seed)
    for index in range(STUDIO_COUNTS[split]):
        product = sample_product(rng, ("white",))
        frame = FRAMES[rng.integers(len(FRAMES))]
        image = render(product, seed * 1_000_003 + index, size_pixels=resolution)
        yield f"{split}/studio_{index:03d}.png", np.asarray(image), product.caption(frame)

"""The catalogue: the same bytes for the same seed, pure white studios, captions that fit."""

import numpy as np
import pytest

from sdkit.mini.catalogue import (
    BACKGROUNDS,
    BASE_BACKGROUNDS,
    COLOURS,
    KINDS,
    Product,
    render,
    render_dataset,
    sample_product,
)  # fmt: skip

SHOE = Product("sneakers", "red", leather=False, background="white")


def test_same_seed_same_bytes():
    assert render(SHOE, 3).tobytes() == render(SHOE, 3).tobytes()
    assert render(SHOE, 3).tobytes() != render(SHOE, 4).tobytes()


def test_datasets_of_one_seed_are_equal():
    first, second = (
        [(image.tobytes(), caption) for image, caption, _ in render_dataset(6, 9)] for _ in "ab"
    )
    assert first == second
    assert len(set(first)) == 6


@pytest.mark.parametrize("kind", KINDS)
def test_white_studios_have_a_pure_white_border(kind):
    for seed in range(40):
        pixels = np.array(render(Product(kind, "black", True, "white"), seed))
        border = np.concatenate([pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]])
        assert (border == 255).all(), seed


@pytest.mark.parametrize("colour", COLOURS)
@pytest.mark.parametrize("kind", KINDS)
def test_the_shoe_has_its_colour(kind, colour):
    pixels = np.array(render(Product(kind, colour, False, "white"), 5)) / 255
    shoe = pixels[(pixels < 0.995).any(axis=2)]
    target = np.array(COLOURS[colour])
    near = (
        np.abs(shoe - target * np.linspace(0.5, 1.1, 13)[:, None, None]).max(axis=2).min(axis=0)
        < 0.08
    )
    assert near.mean() > 0.35


def test_every_product_has_its_own_caption_and_picture():
    products = [
        Product(k, c, leather, b)
        for k in KINDS
        for c in COLOURS
        for leather in (0, 1)
        for b in BACKGROUNDS
    ]
    assert len({product.caption() for product in products}) == len(products) == 320
    some = products[::8]
    assert len({render(product, 1).tobytes() for product in some}) == len(some)


def test_the_base_model_is_never_shown_white_studios():
    assert "white" not in BASE_BACKGROUNDS
    rng = np.random.default_rng(0)
    drawn = {sample_product(rng, BASE_BACKGROUNDS).background for _ in range(200)}
    assert drawn == set(BASE_BACKGROUNDS)


def test_other_sizes_show_the_same_scene():
    small, large = render(SHOE, 3, size_pixels=128), render(SHOE, 3, size_pixels=256)
    assert large.size == (256, 256)
    difference = np.abs(np.array(large.reduce(2), float) - np.array(small, float)).mean()
    assert difference < 4

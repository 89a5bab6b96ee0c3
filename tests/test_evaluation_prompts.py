"""The prompts of an evaluation: complete, balanced, and read back as they were meant."""

from collections import Counter

import pytest

from sdkit import LoRAConfig
from sdkit.finetuning.evaluation_prompts import base_prompts, find_product, studio_prompts
from sdkit.mini.catalogue import BASE_BACKGROUNDS, COLOURS, FRAMES, KINDS, Product


def test_studio_prompts_are_every_colour_of_every_kind_on_white():
    products = [find_product(prompt) for prompt in studio_prompts()]
    assert {(p.kind, p.colour) for p in products} == {(k, c) for k in KINDS for c in COLOURS}
    assert {p.background for p in products} == {"white"}


def test_base_prompts_are_balanced():
    products = [find_product(prompt) for prompt in base_prompts()]
    assert {(p.kind, p.colour) for p in products} == {(k, c) for k in KINDS for c in COLOURS}
    places = Counter((p.kind, p.background) for p in products)
    assert set(places.values()) == {2} and len(places) == len(KINDS) * len(BASE_BACKGROUNDS)
    assert len({(p.colour, p.background) for p in products}) == len(COLOURS) * len(BASE_BACKGROUNDS)


@pytest.mark.parametrize("frame", FRAMES)
@pytest.mark.parametrize("background", [*BASE_BACKGROUNDS, "white"])
def test_a_caption_is_read_back(frame, background):
    for kind in KINDS:
        for colour in COLOURS:
            product = Product(kind, colour, colour == "red", background)
            assert find_product(product.caption(frame)) == product


@pytest.mark.parametrize(
    "prompt",
    ["", "a red car on grass", "black sneakers", "red blue boots on grass", "boots on grass",
     "black boots and black loafers on grass", "teal boots on a wooden floor"],
)  # fmt: skip
def test_other_prompts_are_not_the_catalogues(prompt):
    assert find_product(prompt) is None


def test_no_prompt_that_the_preset_keeps_is_one_that_the_evaluation_draws():
    def what(product):
        return product.kind, product.colour, product.background

    drawn = {what(find_product(prompt)) for prompt in base_prompts()}
    kept = [prompt for prompt in LoRAConfig.load("studio_white").kept_prompts if prompt]
    products = [what(find_product(prompt)) for prompt in kept]
    assert len(products) >= 8 and not drawn & set(products)
    assert {background for _, _, background in products} == set(BASE_BACKGROUNDS)

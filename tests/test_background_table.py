"""Rendered pictures stand in for drawn ones: what each shows is known."""

from types import SimpleNamespace

import numpy as np
from PIL import Image

from sdkit.finetuning.background_table import tabulate_backgrounds
from sdkit.mini.catalogue import Product, render


def picture(background, seed=0):
    pixels = np.asarray(render(Product("boots", "blue", False, background), seed, size_pixels=128))
    return Image.fromarray(pixels)


def run_of(*pictures):
    return SimpleNamespace(images=[SimpleNamespace(pil_image=one) for one in pictures])


def test_each_background_is_counted_by_itself_and_what_took_its_place_is_told():
    asked = ("grey", "grass", "grey", "wood")
    evaluation = SimpleNamespace(
        settings={
            "prompts": ["a studio"],
            "kept_prompts": [*(Product("boots", "blue", False, b).caption() for b in asked), "any"],
        },
        run_before=run_of(picture("white"), *map(picture, asked), picture("grass")),
        run_after=run_of(
            picture("white"), picture("white"), picture("grass"), None, picture("wood"),
            picture("wood"),
        ),
    )  # fmt: skip
    table = tabulate_backgrounds(evaluation)
    assert table["asked"].to_dict() == {"grey": 2, "grass": 1, "wood": 1}
    assert table["before"].to_dict() == table["asked"].to_dict()
    assert table["after"].to_dict() == {"grey": 0, "grass": 1, "wood": 1}
    assert sorted(table["seen instead"]["grey"].split(", ")) == ["bad 1", "white 1"]
    assert table["seen instead"]["grass"] == ""


def test_prompts_that_the_catalogue_does_not_know_have_no_row():
    evaluation = SimpleNamespace(
        settings={"prompts": ["a"], "kept_prompts": ["a cat"]},
        run_before=run_of(None, None), run_after=run_of(None, None),
    )  # fmt: skip
    assert tabulate_backgrounds(evaluation).empty

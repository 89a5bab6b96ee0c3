"""Which backgrounds are still drawn as asked: those of the base, one by one."""

import pandas as pd
import torch

from sdkit.finetuning.evaluation_prompts import find_product
from sdkit.finetuning.picture_groups import read_pictures
from sdkit.mini.classifier import classify, load_classifier


def tabulate_backgrounds(evaluation) -> pd.DataFrame:
    """What the bundled classifier sees on kept prompts of the catalogue, before and after.

    Args:
        evaluation: A LoRAEvaluation with its runs, so one that was not read from a file.

    Returns:
        One row a background that was asked for: `asked`, the right ones `before` and `after`, and
        what was `seen instead` after, such as "white 3". No rows where the catalogue knows none of
        the prompts.
    """
    first = len(evaluation.settings["prompts"])
    asked = [find_product(prompt) for prompt in evaluation.settings["kept_prompts"]]
    seen = [_look(run, first) for run in (evaluation.run_before, evaluation.run_after)]
    pictures = pd.DataFrame(
        [
            (product.background, before, after)
            for product, before, after in zip(asked, *seen, strict=True)
            if product
        ],
        columns=["background", "before", "after"],
    )
    rows = {}
    for background, here in pictures.groupby("background", sort=False):
        wrong = here["after"][here["after"] != background].value_counts()
        rows[background] = {
            "asked": len(here),
            "before": int((here["before"] == background).sum()),
            "after": int((here["after"] == background).sum()),
            "seen instead": ", ".join(f"{name} {count}" for name, count in wrong.items()),
        }
    columns = ["asked", "before", "after", "seen instead"]
    return pd.DataFrame.from_dict(rows, orient="index", columns=columns).rename_axis("background")


def _look(run, first):
    """The background in each picture after the first ones; "bad" where there is none."""
    pictures = read_pictures(run)[first:]
    good = [picture for picture in pictures if picture is not None]
    answers = iter(classify(load_classifier(), torch.stack(good)) if good else ())
    return ["bad" if picture is None else next(answers)["background"] for picture in pictures]

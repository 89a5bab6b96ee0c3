"""A group of pictures, measured by its pixels, and by the classifier where that knows them."""

# N M pictures, H W pixels, D features

import numpy as np
import torch

from sdkit.finetuning.evaluation_prompts import find_product
from sdkit.finetuning.evaluation_report import PictureMeasures
from sdkit.finetuning.picture_measures import (
    measure_change,
    measure_diversity,
    measure_kernel_distance,
    measure_white_border,
)
from sdkit.mini.classifier import QUESTIONS, classify, shrink_images


def read_pictures(run) -> list:
    """Returns each picture of a RunRecord, (3, H, W) in [0, 1], or None where it was bad."""
    return [
        None
        if image.pil_image is None
        else torch.from_numpy(np.array(image.pil_image)).permute(2, 0, 1).float() / 255
        for image in run.images
    ]


def measure_pictures(pictures, prompts, judge=None, held_out=None) -> PictureMeasures:
    """Measures a group of pictures.

    Args:
        pictures: N of (3, H, W) in [0, 1], or None where one was bad.
        prompts: N, what they shall show.
        judge: The bundled classifier, or None where it knows nothing of such pictures.
        held_out: (M, 3, H, W), what they shall be like; None measures no distance.
    """
    pairs = [(x, prompt) for x, prompt in zip(pictures, prompts, strict=True) if x is not None]
    if not pairs:
        return PictureMeasures(asked=len(pictures), valid=0)
    images = torch.stack([picture for picture, _ in pairs])
    shares = measure_white_border(images)
    has_distance = judge is not None and held_out is not None
    return PictureMeasures(
        asked=len(pictures),
        valid=len(images),
        white_border=float(shares.mean()),
        white_border_least=float(shares.min()),
        white_border_253=float(measure_white_border(images, 253).mean()),
        white_border_255=float(measure_white_border(images, 255).mean()),
        distance=measure_kernel_distance(
            find_features(judge, images), find_features(judge, held_out)
        )
        if has_distance
        else None,
        diversity=measure_diversity(images),
        **_judge_answers(judge, images, [prompt for _, prompt in pairs]),
    )


def _judge_answers(judge, images, prompts):
    """The share of right answers to each question, over the prompts that the catalogue knows."""
    products = [find_product(prompt) for prompt in prompts]
    if judge is None or not any(products):
        return {}
    answers = classify(judge, images)
    return {
        f"{question}_right": float(
            np.mean(
                [
                    answer[question] == getattr(product, question)
                    for answer, product in zip(answers, products, strict=True)
                    if product
                ]
            )
        )
        for question in QUESTIONS
    }


@torch.no_grad()
def find_features(judge, images) -> torch.Tensor:
    """Returns what the classifier sees in pictures (N, 3, H, W), before it answers: (N, D)."""
    return judge[:-1](shrink_images(images))


def measure_drift(before, after) -> float | None:
    """Returns the mean change of pictures that are valid on both sides, in 8-bit levels."""
    pairs = [(x, y) for x, y in zip(before, after, strict=True) if x is not None and y is not None]
    if not pairs:
        return None
    return float(measure_change(*(torch.stack(side) for side in zip(*pairs, strict=True))).mean())

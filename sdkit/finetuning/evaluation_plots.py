"""Before and after, side by side: the same prompts and seeds, with and without an adapter."""

import math
from pathlib import Path

from PIL import Image

from sdkit.figures import plot_images
from sdkit.generation import RunRecord
from sdkit.validation import ValidationError

SHOWN = 4  # prompts of each kind


def plot_before_after(evaluation):
    """Draws pictures of an evaluation: above those of the base, below them those of the adapter.

    At most four prompts that shall have been learnt and four that shall not have changed.

    Args:
        evaluation: What `evaluate_lora` returned.

    Returns:
        A new Figure, already closed: return it from a cell to see it, or save it.
    """
    asked = len(evaluation.settings["prompts"])
    total = asked + len(evaluation.settings["kept_prompts"])
    chosen = [*spread(range(asked), SHOWN), *spread(range(asked, total), SHOWN)]
    runs = {"base": evaluation.run_before, "adapter": evaluation.run_after}
    shown = [(name, run.images[index]) for name, run in runs.items() for index in chosen]
    return plot_images(
        [image.pil_image for _, image in shown],
        [f"{name}: {shorten(image.prompt)}" for name, image in shown],
        problems=[image.problem for _, image in shown],
        columns=len(chosen),
        heading="Before and after",
    )


def plot_on_the_way(report, *, prompt=0):
    """Draws what a training drew of one prompt, from before its first step to its end.

    Args:
        report: A TrainReport of a run with validation prompts.
        prompt: Which of them.

    Returns:
        A new Figure, already closed: return it from a cell to see it, or save it.

    Raises:
        ValidationError: It had none.
    """
    folders = [Path(report.run_folder) / name for name in report.validation_images]
    if not folders:
        raise ValidationError(
            "report: it drew nothing on the way. Set validation_prompts, and train again."
        )
    images = [RunRecord.load(folder / "record.json").images[prompt] for folder in folders]
    return plot_images(
        [
            image.path and Image.open(folder / image.path)
            for folder, image in zip(folders, images, strict=True)
        ],
        [f"after {int(folder.name.rpartition('_')[2])} steps" for folder in folders],
        problems=[image.problem for image in images],
        columns=len(folders),
        heading=images[0].prompt,
    )


def spread(items, count):
    """Returns `count` of the items, all over the list, or all if they are fewer.

    The stride has no divisor in common with the number of items: of kinds times colours in a grid
    it takes each in turn, where an even stride would take one colour alone.
    """
    total = len(items)
    if not 0 < count < total:
        return list(items)[: max(count, 0)]
    stride = next(s for s in range(total // count, 2 * total) if math.gcd(s, total) == 1)
    return [items[index] for index in sorted(place * stride % total for place in range(count))]


def shorten(prompt):
    """Leaves out of a prompt of the catalogue what all of them have."""
    return prompt.partition("photo of ")[2].partition(", high quality")[0] or prompt

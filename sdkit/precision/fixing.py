"""`sdkit fix`: climbs the ladder until a rung is proven, and writes what it takes to stay there."""

import json
import shutil
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch

from sdkit.attention import allow_unsafe_attention
from sdkit.figures import plot_images, save_figure
from sdkit.generation.record import plain
from sdkit.loading import load_pipeline
from sdkit.loading.recipe import mixed_precision
from sdkit.precision.drawing import describe_arithmetic
from sdkit.precision.ladder import Rung, climb
from sdkit.precision.rungs import HOW, rebalanced
from sdkit.run_folder import replace_file
from sdkit.validation import ValidationError, check_is_writable

FIX_NAME = "fix.json"
RECIPE_NAME = "recipe.json"
PICTURE_NAME = "before_after.png"
MODEL_NAME = "model"
UNFINISHED_NAME = ".fix.unfinished"  # where it is, what lies beside it is half-written


@dataclass(frozen=True)
class Fix:
    """What was tried and what to do.

    Attributes:
        rungs: Those that were run, in order.
        chosen: The first that is proven, or None.
        how: The line to type; "" if nothing cures.
        folder: Where the recipe or the model and the picture are.
        emulated: What was emulated; None on a device that computes in float16 itself.
    """

    rungs: tuple[Rung, ...]
    chosen: Rung | None
    how: str
    folder: Path
    emulated: str | None = None

    def __str__(self):
        """One line a rung, then what to do."""
        width = max(len(rung.name) for rung in self.rungs)
        lines = [f"{rung.name:{width}}  {tell(rung)}" for rung in self.rungs]
        if self.emulated:
            lines += ["", f"{self.emulated}: numbers, never seconds or memory"]
        if self.chosen is None:
            return "\n".join([*lines, "", "nothing cures it: run sdkit diagnose"])
        return "\n".join([*lines, "", f"do this: {self.how}", f"written to {self.folder}"])

    def to_json(self) -> str:
        """The table and the choice as JSON."""
        content = {
            "rungs": [rung.to_row() for rung in self.rungs],
            "chosen": self.chosen and self.chosen.name,
            "how": self.how,
            "emulated": self.emulated,
        }
        return json.dumps(plain(content), indent=2) + "\n"


def tell(rung: Rung) -> str:
    """What came of a rung, in a few words."""
    valid = f"{rung.valid} of {rung.count} valid"
    quality = f", {rung.psnr_db:.1f} dB" if rung.psnr_db is not None else ""
    size = "" if rung.weight_bytes is None else f", {rung.weight_bytes / 2**20:.1f} MiB"
    hides = ", but only hides the fault" if rung.only_hides else ""
    return f"{valid}{quality}{size}{hides}{f' ({rung.note})' if rung.note else ''}"


def fix_model(
    model,
    prompts,
    output_folder,
    *,
    backend="auto",
    attention="sdpa",
    emulation=None,
    seed=0,
    progress=True,
    **pipe_kwargs,
) -> Fix:
    """Finds the smallest change with which a model draws right in reduced precision.

    Args:
        model: As in `load_pipeline`.
        prompts: One or a list.
        output_folder: For `fix.json`, `before_after.png`, and the recipe or the rebalanced model.
        backend: As in `load_pipeline`.
        attention: The attention that failed.
        emulation: A function that returns a context manager, such as `emulate.mps`, or None.
        seed: Image i is drawn from seed + i.
        progress: Show progress bars.
        **pipe_kwargs: For the pipeline call.

    Returns:
        A Fix; `chosen` is None if no rung is proven.

    Raises:
        ValidationError: The folder cannot be written to, or what it is cleared of is the model; the
            model cannot be loaded; or float32 itself is bad.
    """
    folder = check_is_writable(output_folder)
    check_is_apart(model, folder)
    with allow_unsafe_attention():  # it is what is to be fixed
        pipe, _ = load_pipeline(
            model, backend=backend, dtype="float32", attention=attention, progress=progress
        )
        pipe.set_progress_bar_config(disable=True)
        with emulation() if emulation else nullcontext():
            rungs = climb(
                pipe, prompts, seed=seed, stop_when_proven=True, progress=progress, **pipe_kwargs
            )
            emulated = describe_arithmetic(pipe)
    chosen = rungs[-1] if rungs[-1].is_proven else None
    remove_earlier(folder)
    (folder / UNFINISHED_NAME).touch()
    how = HOW[chosen.name].replace("{folder}", str(folder)) if chosen else ""
    if chosen and chosen.recipe:
        chosen.recipe.save(folder / RECIPE_NAME)
    if chosen and chosen.name == "rebalanced float16":
        with rebalanced(pipe), mixed_precision(pipe, [], torch.float16):
            pipe.save_pretrained(folder / MODEL_NAME)
    save_figure(plot_before_after(rungs[0], chosen), folder / PICTURE_NAME)
    fix = Fix(tuple(rungs), chosen, how, folder, emulated)
    with replace_file(folder / FIX_NAME) as temporary:  # last: what has it is whole
        temporary.write_text(fix.to_json())
    (folder / UNFINISHED_NAME).unlink()
    return fix


def check_is_apart(model, folder):
    """Refuses a model that an earlier fix left in this folder: it would be removed from it."""
    earlier, path = (folder / MODEL_NAME).resolve(), Path(str(model)).resolve()
    if path.exists() and path.is_relative_to(earlier):
        raise ValidationError(
            f"{model}: is what an earlier fix left in {folder}, which is cleared for this one. "
            "Choose another output folder."
        )


def remove_earlier(folder):
    """Removes what an earlier fix left there, or one might follow the recipe of another model.

    One that was killed while it wrote counts too.
    """
    if not any((folder / name).exists() for name in (FIX_NAME, UNFINISHED_NAME)):
        return
    for name in (FIX_NAME, RECIPE_NAME, PICTURE_NAME):
        (folder / name).unlink(missing_ok=True)
    shutil.rmtree(folder / MODEL_NAME, ignore_errors=True)


def plot_before_after(before: Rung, after: Rung | None):
    """The images of the first rung beside those of the one that cures."""
    rungs = [before, *([after] if after and after is not before else [])]
    drawn = [
        (image, rung.name, problem)
        for rung in rungs
        for image, problem in zip(rung.images, rung.problems, strict=True)
    ]
    images, titles, problems = zip(*drawn, strict=True)
    return plot_images(images, titles, problems=problems, columns=max(2, before.count))

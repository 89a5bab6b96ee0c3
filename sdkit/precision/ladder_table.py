"""The ladder's numbers as one table, and its pictures as one figure: failures by rungs."""

import numpy as np
import pandas as pd
from matplotlib import pyplot as plt

from sdkit.figures import COLOURS, GOOD, QUIET, figure_style, plot_image
from sdkit.precision.ladder import Rung
from sdkit.precision.rungs import FLOAT32

TILE_INCHES = 1.15
DOUBTFUL = COLOURS[1]
LEGEND = (
    "Under each: valid images of all, weight bytes as a share of float32's; least PSNR and SSIM of "
    "an image to the healthy model's float32."
)


def tabulate_ladder(climbed) -> pd.DataFrame:
    """One row a failure and rung.

    Args:
        climbed: From `climb_failures`.

    Returns:
        Columns: failure, rung, valid and count (images), weight share (of float32's bytes; above 1
        where both are held; None where the rung could not be put on), PSNR dB and SSIM (the least
        of an image), seconds an image (None under emulation), proven, only hides, problem, note.
    """
    rows = []
    for name, rungs in climbed.items():
        whole = next(rung.weight_bytes for rung in rungs if rung.name == FLOAT32)
        rows += [
            {
                "failure": name,
                "rung": rung.name,
                "valid": rung.valid,
                "count": rung.count,
                "weight share": rung.weight_bytes and rung.weight_bytes / whole,
                "PSNR dB": rung.psnr_db,
                "SSIM": rung.ssim,
                "seconds an image": rung.seconds,
                "proven": rung.is_proven,
                "only hides": rung.only_hides,
                "problem": next(filter(None, rung.problems), ""),
                "note": rung.note,
            }
            for rung in rungs
        ]
    return pd.DataFrame(rows)


def plot_ladder(climbed, *, heading=""):
    """Draws failures as rows and rungs as columns: the first image, and the numbers under it.

    Args:
        climbed: From `climb_failures`.
        heading: Title above the grid.

    Returns:
        A new Figure, already closed: return it from a cell to see it, or save it.
    """
    names = list(dict.fromkeys(rung.name for rungs in climbed.values() for rung in rungs))
    width, height = TILE_INCHES * len(names) + 1, 1.47 * TILE_INCHES * len(climbed) + 0.85
    with figure_style():
        figure, grid = plt.subplots(
            len(climbed), len(names), figsize=(width, height), squeeze=False,
            gridspec_kw={
                "left": 1 / width, "right": 1, "bottom": 0.5 / height, "top": 1 - 0.85 / height,
                "wspace": 0.08, "hspace": 0.47,
            },
        )  # fmt: skip
        plt.close(figure)
        figure.text(0, 1, heading, va="top", fontsize=11, fontweight="bold")
        figure.text(0, 1 - 0.24 / height, LEGEND, va="top", fontsize=8, color=QUIET)
        for axes, (failure, rungs) in zip(grid, climbed.items(), strict=True):
            by_name = {rung.name: rung for rung in rungs}
            axes[0].set_ylabel(
                failure.replace(" ", "\n", 1), rotation=0, ha="right", va="center", fontsize=8
            )
            for ax, name in zip(axes, names, strict=True):
                if ax in grid[0]:
                    ax.set_title(name.replace(" ", "\n", 1), fontsize=8, loc="center")
                plot_rung(ax, by_name.get(name), by_name[FLOAT32].weight_bytes)
    return figure


def plot_rung(ax, rung: Rung | None, whole_bytes: int):
    """Draws one tile: the first image, or where it broke, and the numbers of all images."""
    if rung is None:
        ax.set(xticks=[], yticks=[], xlabel="not here")
        return ax
    image = rung.images[0] if rung.images else None
    problem = rung.problems[0] if rung.problems else "not possible"
    lines = [f"{rung.valid}/{rung.count}"]
    if rung.weight_bytes is not None:
        lines[0] += f" · {rung.weight_bytes / whole_bytes:.2f}x"
    if rung.psnr_db is not None:
        lines += ["equal" if np.isinf(rung.psnr_db) else f"{rung.psnr_db:.0f} dB · {rung.ssim:.3f}"]
    lines += ["only hides it"] * rung.only_hides
    where = problem and problem.replace(" in the ", "\n").replace(", ", "\n").replace("_", " ")
    plot_image(ax, image, title="\n".join(lines), problem=where)
    ax.xaxis.label.set_fontsize(7)
    for text in ax.texts:
        text.set_fontsize(7)
    if rung.is_proven:
        ax.xaxis.label.set_color(GOOD)
    elif not problem:
        ax.xaxis.label.set_color(DOUBTFUL)
    return ax

"""One quiet look for every figure, and files that are whole and the same each time.

Figures are dark on an opaque white card, so they read alike on a dark page and on a light one.
"""

import textwrap
from pathlib import Path

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.figure import Figure

from sdkit.run_folder import replace_file

INK = "#1f2933"
QUIET = "#616e7c"
GRID = "#e4e7eb"
GOOD = "#1b7f5c"
BAD = "#c81e1e"
# Told apart by readers with any colour vision, and in grey (Okabe and Ito, 2008, reordered).
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00")
DPI = 150
DESCRIPTION = "Description"  # as the PNG standard calls this text
TILE_INCHES, GAP_INCHES = 1.9, 0.12
TITLE_LETTERS = 32  # as many as fit under a tile
STYLE = {
    "figure.facecolor": "white",
    "savefig.facecolor": "white",
    "axes.facecolor": "white",
    "axes.edgecolor": QUIET,
    "axes.labelcolor": INK,
    "axes.titlecolor": INK,
    "axes.titlesize": 10,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.labelsize": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "axes.prop_cycle": mpl.cycler(color=COLOURS),
    "grid.color": GRID,
    "text.color": INK,
    "xtick.color": QUIET,
    "ytick.color": QUIET,
    "xtick.labelsize": 8,
    "ytick.labelsize": 8,
    "legend.frameon": False,
    "legend.fontsize": 8,
    "font.size": 9,
    "font.family": "DejaVu Sans",  # comes with matplotlib: the same letters on every machine
    "svg.hashsalt": "sdkit",
}


def figure_style():
    """Returns a context manager under which new figures have sdkit's look.

    with figure_style():
        figure, ax = plt.subplots()
    """
    return mpl.rc_context(STYLE)


def save_figure(figure, path, description=""):
    """Writes a figure, whole or not at all; the same figure gives the same bytes.

    Args:
        figure: A matplotlib Figure, or an Axes of it.
        path: Where to; its ending (.png, .svg, .pdf) is the format. Missing folders are made.
        description: What it shows, kept inside a PNG: the caption on the page of `sdkit demo`, and
            what a screen reader says.

    Returns:
        The path, as a `Path`.
    """
    figure = figure if isinstance(figure, Figure) else figure.figure
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    metadata = {".svg": {"Date": None}, ".pdf": {"CreationDate": None}}.get(path.suffix, {})
    if description and path.suffix == ".png":
        metadata = {DESCRIPTION: description}
    with replace_file(path) as temporary, figure_style():
        figure.savefig(
            temporary,
            format=path.suffix.removeprefix("."),
            dpi=DPI,
            bbox_inches="tight",
            pad_inches=0.1,
            metadata=metadata,
        )
    return path


def plot_image(ax, image, *, title="", problem=None):
    """Draws one image, or a black tile with a red border where there is none to show.

    Args:
        ax: The Axes to draw on.
        image: PIL image; array (H, W), (H, W, 3) or (H, W, 4), uint8 or float in [0, 1]; or None.
        title: Caption under the image; may have several lines.
        problem: What is wrong with the image, as "nan"; None if it is valid. NaN is drawn black,
            which is what a viewer would show.

    Returns:
        The Axes.
    """
    pixels = np.zeros((8, 8, 3)) if image is None else np.asarray(image)
    if pixels.dtype.kind == "f":
        pixels = np.nan_to_num(pixels, nan=0.0, posinf=1.0, neginf=0.0).clip(0, 1)
    ax.imshow(pixels, cmap="gray", vmin=0, vmax=255 if pixels.dtype == np.uint8 else 1)
    ax.set(xticks=[], yticks=[])
    if image is None and problem is None:
        problem = "no image"
    for spine in ax.spines.values():
        spine.set_visible(problem is not None)
        spine.set(color=BAD, linewidth=2.5)
    if problem is not None:
        ax.text(
            0.5, 0.5, problem, transform=ax.transAxes, ha="center", va="center", color="white",
            fontsize=9, fontweight="bold", bbox={"facecolor": BAD, "edgecolor": "none", "pad": 4},
        )  # fmt: skip
    ax.set_xlabel(title, color=QUIET if problem is None else BAD, fontsize=8, labelpad=4)
    return ax


def plot_images(images, titles=None, *, problems=None, columns=None, heading=""):
    """Draws a grid of images; invalid ones are black tiles with a red border and the problem.

    Args:
        images: Images as in `plot_image`; None is a black tile.
        titles: One caption each, wrapped to the tile; None for none.
        problems: One each: what is wrong, or None where the image is valid.
        columns: Images in a row; by default up to 4.
        heading: Title above the grid.

    Returns:
        A new Figure, already closed: return it from a cell to see it, or save it.

    Raises:
        ValueError: No image, or not one title and problem each.
    """
    images = list(images)
    if not images:
        raise ValueError("images: got none, expected at least one (None for a black tile).")
    titles = [""] * len(images) if titles is None else list(titles)
    problems = [None] * len(images) if problems is None else list(problems)
    if not len(images) == len(titles) == len(problems):
        raise ValueError(
            f"got {len(images)} images, {len(titles)} titles and {len(problems)} problems, "
            "expected one each."
        )
    columns = min(columns or 4, len(images))
    rows = -(-len(images) // columns)
    titles = ["\n".join(textwrap.wrap(title, TITLE_LETTERS)) for title in titles]
    title_inches = 0.15 * max(title.count("\n") + bool(title) for title in titles) + 0.15
    heading_inches = 0.3 if heading else 0.0
    tile_inches = TILE_INCHES + title_inches
    width, height = columns * (TILE_INCHES + GAP_INCHES), rows * tile_inches + heading_inches
    with figure_style():
        figure = plt.figure(figsize=(width, height))
        # Closed, for a notebook would draw it twice: as an open figure, and as the cell's value.
        # Not made without pyplot, for then a notebook may not know how to draw it at all.
        plt.close(figure)
        if heading:
            figure.text(0, 1, heading, va="top", fontsize=11, fontweight="bold")
        for i, (image, title, problem) in enumerate(zip(images, titles, problems, strict=True)):
            row, column = divmod(i, columns)
            left = column * (TILE_INCHES + GAP_INCHES)
            bottom = height - heading_inches - row * tile_inches - TILE_INCHES
            box = (left / width, bottom / height, TILE_INCHES / width, TILE_INCHES / height)
            plot_image(figure.add_axes(box), image, title=title, problem=problem)
    return figure


def plot_bars(ax, labels, values, *, colours=None, unit=""):
    """Draws horizontal bars, each with its number beside it; a missing value says so.

    Args:
        ax: The Axes to draw on.
        labels: One name a bar, from top to bottom.
        values: One number a bar; None (not measured, as under emulation) draws no bar.
        colours: One colour a bar; by default all alike.
        unit: What the numbers are in, as "s" or "GiB".

    Returns:
        The Axes.
    """
    positions = range(len(labels))
    widths = [value or 0 for value in values]
    ax.barh(positions, widths, color=colours or COLOURS[0], height=0.6)
    for position, value in zip(positions, values, strict=True):
        text = "not measured" if value is None else f"{value:.3g} {unit}".strip()
        ax.text(
            value or 0, position, f" {text}", va="center", fontsize=8,
            color=QUIET if value is None else INK,
        )  # fmt: skip
    ax.set_yticks(positions, labels)
    ax.set_xlim(0, 1.25 * max(widths, default=0) or 1)
    ax.invert_yaxis()
    ax.tick_params(axis="y", length=0)
    ax.spines["left"].set_visible(False)
    ax.xaxis.set_visible(False)
    ax.spines["bottom"].set_visible(False)
    return ax

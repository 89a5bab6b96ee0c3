"""The figure of a sweep: one picture a run, or where runs drew none, one bar."""

import contextlib
import textwrap
import warnings
from pathlib import Path

import matplotlib.pyplot as plt
from PIL import Image

from sdkit.batch.execution import DONE
from sdkit.batch.results import list_rows
from sdkit.figures import BAD, COLOURS, figure_style, plot_bars, plot_images, save_figure
from sdkit.verdict import strict_pillow

FIGURE_NAME = "figure.png"
MOST_TILES = 60
PICTURE_PIXELS = 320
VALUE_LETTERS = 40
NO_PICTURE = (OSError, SyntaxError, ValueError, Image.DecompressionBombError, Warning)


def save_sheet(table, folder):
    """Draws a sweep's runs and returns the path of the figure.

    Args:
        table: What `load_results` returned.
        folder: The sweep's.
    """
    left_out = f", the first {MOST_TILES}" if len(table) > MOST_TILES else ""
    counted = f"{len(table)} runs{left_out}, {sum(table['good'])} good"
    heading = f"{table.attrs['notebook']}: {counted} · {' · '.join(table.attrs['varied'])}"
    heading = _as_written(heading)
    rows = list_rows(table.head(MOST_TILES))
    pictures = [open_picture(folder, row) for row in rows]
    titles = [describe_run(row, table.attrs["varied"]) for row in rows]
    if any(pictures):
        problems = [describe_problem(row) for row in rows]
        figure = plot_images(pictures, titles, problems=problems, columns=6, heading=heading)
    else:
        with figure_style():
            figure, ax = plt.subplots(figsize=(7, 0.6 + 0.28 * len(rows)))
            colours = [COLOURS[0] if row["good"] else BAD for row in rows]
            plot_bars(ax, titles, [row["seconds"] for row in rows], colours=colours, unit="s")
            ax.set_title(heading)
            plt.close(figure)
    with warnings.catch_warnings():
        # A letter that the font lacks is drawn as a box; the page shows it.
        warnings.filterwarnings("ignore", "Glyph .* missing from font")
        return save_figure(figure, Path(folder) / FIGURE_NAME)


def open_picture(folder, row):
    """Returns what a run drew, small: its first image, else its first figure, else None.

    A file that cannot be opened as a picture is passed over.
    """
    if row["status"] != DONE:
        return None
    output = Path(folder) / row["path"] / "output"
    for pattern in ("*.png", "figures/*.png", "*/*.png"):
        for path in sorted(output.glob(pattern)):
            # Pillow raises these for what is no picture, is cut off, or is too large to be one.
            with contextlib.suppress(*NO_PICTURE), strict_pillow(), Image.open(path) as image:
                image.thumbnail((PICTURE_PIXELS, PICTURE_PIXELS))
                return image.convert("RGB")
    return None


def describe_run(row, varied):
    """Returns "float16 · 4": the values that tell a run from the others, to draw as a title."""
    values = [textwrap.shorten(str(row[name]), VALUE_LETTERS) for name in varied]
    return _as_written(" · ".join(values)) or row["run_id"]


def _as_written(text):
    return text.replace("$", r"\$")  # matplotlib would read a formula


def describe_problem(row):
    """Returns in a word what is wrong with a run, or None."""
    if row["good"]:
        return None
    return "invalid" if row["status"] == DONE else row["status"]

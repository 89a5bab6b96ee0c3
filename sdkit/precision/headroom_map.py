"""The map of a network: which part of it, at which step, has how many bits left in float16."""

import math

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.colors import LinearSegmentedColormap, TwoSlopeNorm

from sdkit.figures import BAD, COLOURS, INK, QUIET, figure_style
from sdkit.precision.headroom import Headroom, find_bits

# Red where float16 overflows, pale at the limit, blue where there is room.
ROOM = LinearSegmentedColormap.from_list(
    "room", [(0.0, "#8f1414"), (0.35, BAD), (0.5, "#f6efe6"), (0.62, "#9ecae1"), (1.0, COLOURS[0])]
)
LEAST_BITS, MOST_BITS = -6, 16
COLUMN_INCHES, STEP_INCHES = 0.17, 0.16
# Parts of a path that say where in the network a block is; what is inside of it is one column.
BLOCKS = ("resnets", "attentions", "downsamplers", "upsamplers", "layers", "transformer_blocks")
SHORT = {
    "down_blocks.": "down ", "up_blocks.": "up ", "mid_block": "mid", ".resnets.": " resnet ",
    ".attentions.": " attention ", ".downsamplers.0": " sampler", ".upsamplers.0": " sampler",
    "text_model.": "", "encoder.layers.": "layer ", "transformer_blocks.": "block ",
}  # fmt: skip


def plot_headroom(headroom: Headroom, *, dtype="float16"):
    """Draws the parts of each stage from left to right, and the steps from top to bottom.

    A cell shows the bits left between the greatest |x| of all ops in that part and the dtype's
    maximum; what overflows is red and marked. Parts that run once have one tall cell.

    Args:
        headroom: See `measure_headroom`.
        dtype: "float16" or "bfloat16".

    Returns:
        A new Figure, already closed: return it from a cell to see it, or save it.
    """
    panels = make_panels(headroom, dtype)
    steps = max(len(rows) for rows, _, _ in panels.values())
    columns = sum(len(names) for _, names, _ in panels.values())
    height = max(1.6, steps * STEP_INCHES)
    with figure_style():
        figure, axes = plt.subplots(
            1, len(panels), figsize=(columns * COLUMN_INCHES + 1.6, height + 2.1), squeeze=False,
            width_ratios=[len(names) for _, names, _ in panels.values()], layout="constrained",
        )  # fmt: skip
        plt.close(figure)
        for ax, (stage, (rows, names, bits)) in zip(axes[0], panels.items(), strict=True):
            mesh = plot_panel(ax, stage, rows, names, bits)
        bar = figure.colorbar(mesh, ax=axes[0].tolist(), aspect=24, pad=0.01, fraction=0.02)
        bar.set_label(f"bits left below {dtype}'s maximum")
        bar.outline.set_visible(False)
        bar.ax.set_yticks([LEAST_BITS, 0, 4, 8, 12, MOST_BITS])
        overflowing = sum(int((bits <= 0).any(axis=0).sum()) for _, _, bits in panels.values())
        verdict = f"{overflowing} of {columns} parts overflow" if overflowing else "everything fits"
        figure.suptitle(
            f"Headroom in {dtype}: {verdict}", x=0.01, ha="left", fontsize=11, fontweight="bold"
        )
    return figure


def plot_panel(ax, stage, rows, names, bits):
    """Draws one stage: columns are its parts in the order of the run."""
    norm = TwoSlopeNorm(0, LEAST_BITS, MOST_BITS)
    shown = bits.clip(LEAST_BITS, MOST_BITS)
    mesh = ax.pcolormesh(
        np.arange(len(names) + 1), np.arange(len(rows) + 1), shown, cmap=ROOM, norm=norm,
        edgecolors="white", linewidth=0.4,
    )  # fmt: skip
    for row, column in np.argwhere(bits <= 0):
        colour = "white" if bits[row, column] < -1.5 else INK
        ax.plot(column + 0.5, row + 0.5, marker="x", color=colour, markersize=4, mew=1.2)
    ax.invert_yaxis()
    ax.set_title(stage.replace("_", " "), color=INK)
    ax.set_xticks(np.arange(len(names)) + 0.5, names, rotation=90, fontsize=6)
    is_loop = rows != [None]
    every = max(1, len(rows) // 10)
    ticks = range(0, len(rows), every) if is_loop else ()
    ax.set_yticks([row + 0.5 for row in ticks], [str(rows[row]) for row in ticks])
    ax.set_ylabel("step" if is_loop else "runs once", color=QUIET)
    ax.tick_params(length=0)
    for spine in ax.spines.values():
        spine.set_visible(False)
    return mesh


def make_panels(headroom: Headroom, dtype):
    """{stage: (steps, names of parts, bits left as an array of steps x parts)}."""
    largest = {}
    for op in headroom.ops:
        if op.module:
            part = name_part(op.stage, op.module)
            for step, value in zip(op.steps, op.largest, strict=True):
                cells = largest.setdefault(op.stage, {}).setdefault(part, {})
                cells[step] = max(cells.get(step, 0.0), value)
    panels = {}
    for stage, parts in largest.items():
        steps = sorted({s for cells in parts.values() for s in cells}, key=lambda s: (s is None, s))
        bits = [[find_bits(c.get(s, math.nan), dtype) for c in parts.values()] for s in steps]
        panels[stage] = steps, list(parts), np.array(bits)
    return panels


def name_part(stage, module) -> str:
    """Where in the network a module is, shortly: "down 0 resnet 1", or its own name."""
    pieces = module.removeprefix(stage).removeprefix(".").split(".")
    if stage.startswith("vae") and pieces[0] in ("encoder", "decoder") and len(pieces) > 1:
        prefix, pieces = f"{pieces[0][:3]} ", pieces[1:]
    else:
        prefix = ""
    for i, piece in enumerate(pieces[:-1]):
        if piece in BLOCKS:
            pieces = pieces[: i + 2]
            break
    else:
        pieces = pieces[: 2 if pieces[0].endswith("blocks") else 1]
    name = ".".join(pieces)
    for long, short in SHORT.items():
        name = name.replace(long, short)
    return prefix + (name or "own ops").replace("_", " ")

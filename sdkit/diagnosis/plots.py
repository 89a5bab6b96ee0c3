"""Pictures of a diagnosis: the ablation grid, the timeline of magnitudes, one NaN's anatomy."""

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.colors import to_rgb

from sdkit.diagnosis.ablation import FAULTY, HONEST, OWN
from sdkit.diagnosis.op_traits import name_tensors
from sdkit.emulate.mode import suspended
from sdkit.figures import BAD, COLOURS, GRID, INK, QUIET, figure_style, plot_image

FLOAT16_MAXIMUM = 65504
KERNEL_TITLES = {
    FAULTY: "baddbmm reads a buffer it must ignore",
    HONEST: "baddbmm ignores it, as its contract says",
    OWN: "the device's own baddbmm",
}
MEMORY_TITLES = {"stale_float16": "old float16", "stale_float32": "old float32", "nan": "NaN"}
ROW_NOTES = {
    ("float16", "diffusers-sliced"): "the report, before",
    ("float16", "sdpa"): "never run",
    ("float32", "diffusers-sliced"): "the report, after",
}
TENSOR_NAMES = {
    ("aten.baddbmm.default", "self"): "self: the buffer",
    ("aten.baddbmm.default", "batch1"): "batch1: queries",
    ("aten.baddbmm.default", "batch2"): "batch2: keys",
}
TILE, GAP, GROUP_GAP, LABELS, HEAD = 1.0, 0.06, 0.22, 1.3, 0.88  # inches
TENSOR_SIDE = 48  # values of a tensor that are drawn in each direction


def plot_ablation(cells, *, heading=""):
    """Draws the ablation as a grid of its images; those that broke are black and say where.

    Args:
        cells: What `run_ablation` returned.
        heading: Title above the grid.

    Returns:
        A new Figure, already closed: return it from a cell to see it, or save it.
    """
    rows = list(dict.fromkeys((cell.dtype, cell.attention) for cell in cells))
    columns = list(dict.fromkeys((cell.kernel, cell.memory) for cell in cells))
    kernels = list(dict.fromkeys(kernel for kernel, _ in columns))
    step = TILE + GAP

    def left_of(kernel, memory):
        groups_before = kernels.index(kernel)
        return LABELS + columns.index((kernel, memory)) * step + groups_before * GROUP_GAP

    width = max(left_of(*columns[-1]) + TILE, 4.6)
    height = HEAD + len(rows) * step
    with figure_style():
        figure = plt.figure(figsize=(width, height))
        plt.close(figure)

        def write(x, y, text, **style):
            figure.text(x / width, 1 - y / height, text, **{"va": "center", **style})

        write(0, 0.1, heading, fontsize=12, fontweight="bold")
        write(LABELS - 0.12, 0.75, "fresh memory holds", fontsize=9, color=QUIET, ha="right")
        for kernel, memory in columns:
            title = MEMORY_TITLES.get(memory, memory)
            write(left_of(kernel, memory) + TILE / 2, 0.75, title, fontsize=10, ha="center")
        for kernel in kernels:
            first = left_of(*next(column for column in columns if column[0] == kernel))
            colour = BAD if kernel == FAULTY else INK
            style = {"fontsize": 10, "fontweight": "bold", "color": colour}
            write(first, 0.46, KERNEL_TITLES[kernel], **style)
        for row, (dtype, attention) in enumerate(rows):
            middle = HEAD + row * step + TILE / 2
            label = "no slicing" if attention == "sdpa" else "slicing"
            style = {"fontsize": 10, "fontweight": "bold", "ha": "right"}
            write(LABELS - 0.12, middle - 0.09, f"{dtype}\n{label}", **style)
            note = ROW_NOTES.get((dtype, attention), "")
            write(LABELS - 0.12, middle + 0.26, note, fontsize=9, color=QUIET, ha="right")
        for cell in cells:
            bottom = height - HEAD - rows.index((cell.dtype, cell.attention)) * step - TILE
            left = left_of(cell.kernel, cell.memory)
            box = (left / width, bottom / height, TILE / width, TILE / height)
            ax = figure.add_axes(box)
            plot_image(ax, cell.image, problem=cell.problem and describe(cell))
    return figure


def describe(cell) -> str:
    """What a broken cell says on its tile."""
    problem = "NaN" if cell.problem == "nan" else cell.problem
    stage = {"unet": "UNet", "vae": "VAE"}.get(cell.stage, cell.stage)
    step = "" if cell.step is None else f"\nstep {cell.step}"
    return f"{problem}\n{stage}{step}" if stage else problem


def plot_timeline(ax, runs):
    """Draws the largest number of every module's output, in the order of execution.

    Args:
        ax: The Axes to draw on.
        runs: {label: what `measure_activations` returned}, of one model with equal arguments.

    Returns:
        The Axes.
    """
    for index, (label, activations) in enumerate(runs.items()):
        colour = COLOURS[index % len(COLOURS)]
        values = np.array([activation.largest for activation in activations])
        values = np.where(values > 0, values, np.nan)
        ax.plot(values, color=colour, linewidth=0.9, label=label, zorder=9 - index)
        over = np.flatnonzero(values > FLOAT16_MAXIMUM)
        ax.plot(over, values[over], ".", color=BAD, markersize=6)
        for first in over[:1]:
            ax.text(
                first, values[first] * 2.2, activations[first].module, color=BAD, fontsize=8,
                ha="right" if first > len(values) / 2 else "left",
            )  # fmt: skip
    ax.axhline(FLOAT16_MAXIMUM, color=BAD, linewidth=1.2, linestyle="--")
    ax.text(
        1.008, FLOAT16_MAXIMUM, "float16\nends here:\n65,504", color=BAD, fontsize=9, va="center",
        transform=ax.get_yaxis_transform(),
    )  # fmt: skip
    where = [(activation.stage, activation.step) for activation in next(iter(runs.values()))]
    edges = [i for i in range(1, len(where)) if where[i] != where[i - 1]]
    for start, end in zip([0, *edges], [*edges, len(where)], strict=True):
        stage, step = where[start]
        name = {"text_encoder": "text", "vae": "VAE"}.get(stage, f"step {step}")
        ax.text(
            (start + end) / 2, 1.01, name, ha="center", va="bottom", fontsize=8, color=QUIET,
            transform=ax.get_xaxis_transform(),
        )  # fmt: skip
        ax.axvline(end, color=GRID, linewidth=0.8, zorder=0)
    ax.set_yscale("log")
    ax.margins(y=0.12)
    ax.set_xlim(0, len(where))
    ax.set_xticks([])
    ax.set_xlabel("modules in the order in which they run", fontsize=9)
    ax.set_ylabel("largest |value| of the output", fontsize=9)
    ax.legend(loc="lower right", fontsize=9, ncols=len(runs))
    return ax


def plot_bad_op(bad):
    """Draws one op that made NaN: what it was given, what it is, what it made; bad values are red.

    Args:
        bad: The `bad_op` of a Diagnosis that has an `op`, with its live call.

    Returns:
        A new Figure, already closed.
    """
    tensors = dict(name_tensors(bad.call.named))
    inputs = [(summary, tensors[summary.name]) for summary in bad.inputs]
    outputs = list(zip(bad.outputs, bad.call.output, strict=True))[:1]
    tile, gap, middle = 1.75, 0.3, 2.3
    width, height = (len(inputs) + 1) * (tile + gap) + middle, 3.15
    with figure_style():
        figure = plt.figure(figsize=(width, height))
        plt.close(figure)

        def draw(left, summary, tensor):
            box = (left / width, 1 - (tile + 0.55) / height, tile / width, tile / height)
            ax = figure.add_axes(box)
            ax.imshow(paint(tensor), interpolation="nearest")
            ax.set(xticks=[], yticks=[])
            broken = summary.nan_count + summary.inf_count
            for spine in ax.spines.values():
                spine.set(visible=True, color=BAD if broken else QUIET, linewidth=1.2)
            ax.set_xlabel(caption(summary), fontsize=8, color=INK, labelpad=4, loc="left")
            ax.set_title(TENSOR_NAMES.get((bad.op, summary.name), summary.name), fontsize=10)

        for index, (summary, tensor) in enumerate(inputs):
            draw(index * (tile + gap), summary, tensor)
        centre = len(inputs) * (tile + gap) - gap + middle / 2 + gap / 2
        lines = [f"{name}={value}" for name, value in bad.options.items()]
        y = 1 - (0.55 + tile / 2) / height
        figure.text(
            centre / width, y + 0.09, bad.op.removeprefix("aten.").partition(".")[0],
            ha="center", fontsize=12, fontweight="bold",
        )  # fmt: skip
        figure.text(centre / width, y, "→", ha="center", va="center", fontsize=22, color=QUIET)
        figure.text(centre / width, y - 0.08, "\n".join(lines), ha="center", va="top", fontsize=9)
        draw(width - tile, *outputs[0])
        title = f"{bad.module or f'after {bad.after}'}: the first op with NaN or Inf"
        figure.text(0, 1, title, fontsize=11, fontweight="bold", va="top")
        foot = f"A corner of {TENSOR_SIDE} x {TENSOR_SIDE} values of each; NaN and Inf are red.  "
        foot += bad.source or ""
        figure.text(0, 0.01, foot, fontsize=8, color=QUIET)
    return figure


def caption(summary) -> str:
    """Three short lines on a tensor."""
    shape = "x".join(map(str, summary.shape))
    finite = (
        f"{summary.minimum:.3g} to {summary.maximum:.3g}"
        if summary.minimum is not None
        else "no finite value"
    )
    bad = f"{summary.nan_count} NaN, {summary.inf_count} Inf"
    notes = ["nobody wrote it"] * bool(summary.allocated_by)
    notes += ["beta=0: ignore it"] * summary.is_ignored
    note = "; ".join(notes) or "".join(summary.weights[:1])
    return "\n".join([f"{summary.dtype} {shape}", finite, bad, note])


def paint(tensor) -> np.ndarray:
    """A corner of a tensor as an image (H, W, 3): grey by size, red where NaN or Inf."""
    with suspended():
        values = np.atleast_2d(tensor.detach().cpu().double().numpy())
    slices = values.reshape(-1, *values.shape[-2:])
    worst = (~np.isfinite(slices)).sum(axis=(1, 2)).argmax()
    values = slices[worst, :TENSOR_SIDE, :TENSOR_SIDE]
    finite = np.isfinite(values)
    low, high = np.percentile(values[finite], [2, 98]) if finite.any() else (0.0, 1.0)
    grey = np.clip((np.where(finite, values, 0) - low) / max(high - low, 1e-12), 0, 1)
    image = np.repeat(0.25 + 0.7 * grey[..., None], 3, axis=-1)
    image[~finite] = to_rgb(BAD)
    return image

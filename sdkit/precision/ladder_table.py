"""The ladder climbed on failures of known causes: which rung cures which, at what weight.

A failure is one fault: a kernel that reads stale memory, numbers too large in one component, a
weight that is NaN. Every run is judged by the float32 images of the healthy model. The overflows
are planted so that float32 draws those very images, so one reference does for all.
"""

from collections.abc import Callable
from dataclasses import dataclass

import pandas as pd
from matplotlib import pyplot as plt
from tqdm.auto import tqdm

from sdkit.attention import allow_unsafe_attention
from sdkit.diagnosis.ablation import on_device
from sdkit.diagnosis.specimens import overflow_unet, overflow_vae, spoil_weight
from sdkit.figures import GOOD, figure_style, plot_image
from sdkit.guarding import unguarded
from sdkit.loading import load_pipeline
from sdkit.precision.fixing import HOW
from sdkit.precision.ladder import Rung, climb
from sdkit.precision.plan import check_reference, draw_images
from sdkit.validation import judge_image

AS_IT_IS = "float16 as it is"
TOLERANCE_DB = 1.0  # as plan_precision: below what healthy float16 reaches, by no more than this
TILE_INCHES = 1.15


@dataclass(frozen=True)
class Failure:
    """One fault with a known cause.

    Attributes:
        name: Such as "VAE overflow".
        plant: Breaks a pipeline in place; None leaves it whole.
        attention: As in `load_pipeline`.
        devices: Backends where it can happen.
    """

    name: str
    plant: Callable | None
    attention: str
    devices: tuple[str, ...]


EVERYWHERE = ("mps", "cuda", "cpu")
HEALTHY = Failure("nothing (control)", None, "sdpa", EVERYWHERE)
FAILURES = (
    HEALTHY,
    # The kernel that computes beta * input with beta = 0 is MPS's alone (pytorch#187521).
    Failure("stale memory", None, "diffusers-sliced", ("mps",)),
    Failure("UNet overflow", overflow_unet, "sdpa", EVERYWHERE),
    Failure("VAE overflow", overflow_vae, "sdpa", EVERYWHERE),
    Failure("one NaN weight", spoil_weight, "sdpa", EVERYWHERE),
)


def climb_failures(
    model, prompts, *, failures=FAILURES, backend="auto", seed=0, progress=True, **pipe_kwargs
) -> dict[str, list[Rung]]:
    """Runs every rung on every failure; on a CPU they run on the emulated Mac.

    Args:
        model: As in `load_pipeline`; it should be healthy.
        prompts: One or a list.
        failures: Which; the control must be the first for `recommend` to know healthy float16.
        backend: As in `load_pipeline`.
        seed: Image i is drawn from seed + i.
        progress: Show the failures and the rungs.
        **pipe_kwargs: For the pipeline call.

    Returns:
        {name of the failure: its rungs, in order}.

    Raises:
        ValidationError: The healthy model's float32 is bad, so there is nothing to compare with.
    """
    prompts = [prompts] if isinstance(prompts, str) else list(prompts)

    def load(attention):
        with allow_unsafe_attention():  # it is what is to be cured
            pipe, report = load_pipeline(
                model, backend=backend, dtype="float32", attention=attention, progress=False
            )
        pipe.set_progress_bar_config(disable=True)
        return pipe, report.device

    healthy, device = load("sdpa")
    with unguarded(healthy):
        reference = check_reference(draw_images(healthy, prompts, seed, pipe_kwargs))
    here = ("stale_float32", ("baddbmm-beta-zero",)) if device == "cpu" else ("as it comes", None)
    climbed = {}
    for failure in tqdm(failures, unit="failure", disable=not progress):
        pipe, _ = load(failure.attention)
        if failure.plant:
            failure.plant(pipe)
        with on_device(*here), allow_unsafe_attention():
            climbed[failure.name] = climb(
                pipe, prompts, seed=seed, reference=reference, every_rung=True, progress=progress,
                **pipe_kwargs,
            )  # fmt: skip
    return climbed


def tabulate_ladder(climbed) -> pd.DataFrame:
    """One row a failure and rung.

    Args:
        climbed: From `climb_failures`.

    Returns:
        Columns: failure, rung, valid and count (images), weight share (bytes of float32's, in
        [0, 1]), PSNR dB and SSIM (the least of an image), seconds an image (None under
        emulation), proven, note.
    """
    rows = []
    for name, rungs in climbed.items():
        whole = next(rung.weight_bytes for rung in rungs if rung.name == "float32")
        rows += [
            {
                "failure": name,
                "rung": rung.name,
                "valid": rung.valid,
                "count": rung.count,
                "weight share": rung.weight_bytes / whole,
                "PSNR dB": rung.psnr_db,
                "SSIM": rung.ssim,
                "seconds an image": rung.seconds,
                "proven": rung.is_proven,
                "note": rung.note,
            }
            for rung in rungs
        ]
    return pd.DataFrame(rows)


def recommend(table, failures=FAILURES) -> pd.DataFrame:
    """What to do on each device about each failure, chosen by the numbers of a table.

    A rung must be proven. Those within `TOLERANCE_DB` of healthy float16 come first, then those
    of the least weight share, then the first on the ladder. A CPU's own float16 is too slow to be
    of use, so a CPU is offered bfloat16 and float32 alone.

    Args:
        table: From `tabulate_ladder`, with the control.
        failures: Those of the table.

    Returns:
        Columns: device, failure, do, weight share, PSNR dB, how. `do` says so if nothing cures.
    """
    control = table[(table["failure"] == HEALTHY.name) & (table["rung"] == AS_IT_IS)]
    enough_db = control["PSNR dB"].iloc[0] - TOLERANCE_DB
    rows = []
    for device in EVERYWHERE:
        for failure in failures:
            if device not in failure.devices:
                continue
            proven = table[(table["failure"] == failure.name) & table["proven"]]
            if device == "cpu":
                proven = proven[proven["rung"].isin(("bfloat16", "float32"))]
            row = {"device": device, "failure": failure.name}
            if proven.empty:
                row |= {"do": "no dtype cures it: mend the model", "how": "sdkit diagnose"}
            else:
                best = min(
                    proven.to_dict("records"),
                    key=lambda r: (r["PSNR dB"] < enough_db, round(r["weight share"], 2)),
                )
                row |= {"do": best["rung"], "how": HOW[best["rung"]]}
                row |= {column: best[column] for column in ("weight share", "PSNR dB")}
            rows.append(row)
    return pd.DataFrame(rows, columns=["device", "failure", "do", "weight share", "PSNR dB", "how"])


def plot_ladder(climbed, *, heading=""):
    """Draws failures as rows and rungs as columns: the first image, its verdict and its weight.

    Args:
        climbed: From `climb_failures`.
        heading: Title above the grid.

    Returns:
        A new Figure, already closed: return it from a cell to see it, or save it.
    """
    names = list(dict.fromkeys(rung.name for rungs in climbed.values() for rung in rungs))
    width, height = TILE_INCHES * len(names) + 1, 1.42 * TILE_INCHES * len(climbed) + 0.8
    with figure_style():
        figure, grid = plt.subplots(
            len(climbed), len(names), figsize=(width, height), squeeze=False,
            gridspec_kw={
                "left": 1 / width, "right": 1, "bottom": 0.4 / height, "top": 1 - 0.75 / height,
                "wspace": 0.08, "hspace": 0.42,
            },
        )  # fmt: skip
        plt.close(figure)
        figure.text(0, 1, heading, va="top", fontsize=11, fontweight="bold")
        for axes, (failure, rungs) in zip(grid, climbed.items(), strict=True):
            by_name = {rung.name: rung for rung in rungs}
            axes[0].set_ylabel(
                failure.replace(" ", "\n", 1), rotation=0, ha="right", va="center", fontsize=8
            )
            for ax, name in zip(axes, names, strict=True):
                if ax in grid[0]:
                    ax.set_title(name.replace(" ", "\n", 1), fontsize=8, loc="center")
                plot_rung(ax, by_name.get(name), by_name["float32"].weight_bytes)
    return figure


def plot_rung(ax, rung: Rung | None, whole_bytes: int):
    """Draws one tile: the first image, and under it how many are valid and the share of weights."""
    if rung is None:
        ax.set(xticks=[], yticks=[], xlabel="not here")
        return ax
    image = None if rung.images is None else rung.images[0]
    problem = "no image" if rung.note and image is None else "NaN"
    problem = problem if image is None else judge_image(image).problem
    db = "" if rung.psnr_db is None else f"\n{rung.psnr_db:.0f} dB".replace("inf dB", "the same")
    share = rung.weight_bytes / whole_bytes
    plot_image(ax, image, title=f"{rung.valid}/{rung.count} · {share:.2f}x{db}", problem=problem)
    ax.xaxis.label.set_fontsize(7)
    if rung.is_proven:
        ax.xaxis.label.set_color(GOOD)
    return ax

"""The control that the report never ran: every dtype with every attention, memory and kernel.

On the CPU the device is an emulated Mac, and all of it can be chosen. On a real device the kernel
is the device's own, and of what fresh memory holds two things can be chosen beside leaving it as it
comes: zeros, filled in behind every allocation, and NaN, which torch's deterministic mode fills in.
"""

import json
import warnings
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path

from PIL import Image

from sdkit.attention import allow_unsafe_attention
from sdkit.diagnosis.changes import ZeroedMemory
from sdkit.emulate import EmulationWarning, mps
from sdkit.emulate.memory import nan_filled_memory
from sdkit.generation import generate
from sdkit.loading import load_pipeline
from sdkit.run_folder import replace_file

FAULTY, HONEST, OWN = "reads its ignored input", "honest", "the device's own"
KERNEL_FAULTS = {FAULTY: ("baddbmm-beta-zero",), HONEST: (), OWN: None}
EMULATED_MEMORIES = ("zeros", "stale_float16", "stale_float32", "nan")
REAL_MEMORIES = ("as it comes", "zeros", "nan")
ATTENTIONS = ("diffusers-sliced", "sdpa")
FORMAT_VERSION = 1


@dataclass(frozen=True)
class Cell:
    """One run of the grid.

    Attributes:
        dtype: Of the whole pipeline, or a dict by component.
        attention: "diffusers-sliced" or "sdpa".
        kernel: What `baddbmm` does with the input that beta=0 tells it to ignore: `FAULTY`,
            `HONEST`, or `OWN` on a real device.
        memory: What fresh memory held.
        problem: None if the image is valid, else as in `ImageVerdict`.
        stage: Where the first NaN or Inf was, None without one.
        step: Of the denoising loop, None outside of it.
        emulated: Which emulation it ran under, or None.
        image: The valid image, or None; not in the JSON.
    """

    dtype: str | dict
    attention: str
    kernel: str
    memory: str
    problem: str | None
    stage: str | None = None
    step: int | None = None
    emulated: str | None = None
    image: Image.Image | None = field(default=None, repr=False, compare=False)

    @property
    def outcome(self) -> str:
        """The word "valid", or the stage that broke, or else what is wrong with the image."""
        return "valid" if self.problem is None else self.stage or self.problem

    def to_dict(self) -> dict:
        """Everything but the image, as JSON types."""
        return {name: value for name, value in vars(self).items() if name != "image"}


def list_conditions(is_emulated: bool) -> tuple[tuple[str, str], ...]:
    """The columns of the grid, (kernel, memory): what can be chosen on this device."""
    if is_emulated:
        return tuple(
            (kernel, memory) for kernel in (FAULTY, HONEST) for memory in EMULATED_MEMORIES
        )
    return tuple((OWN, memory) for memory in REAL_MEMORIES)


def run_ablation(
    model, prompt, *, backend="auto", dtypes=("float16", "float32"), **arguments
) -> tuple[Cell, ...]:
    """Runs every cell of the grid with one seed.

    Args:
        model: As in `load_pipeline`.
        prompt: What to draw.
        backend: As in `load_pipeline`; on a CPU the device is emulated.
        dtypes: The dtypes to compare.
        **arguments: For `generate`: seed, image_size, num_inference_steps and so on.

    Returns:
        The cells, row by row: dtype, then attention, then the columns of `list_conditions`.
    """
    cells = []
    for dtype in dtypes:
        for attention in ATTENTIONS:
            pipe, is_emulated = load_for_trial(model, backend, dtype, attention)
            for kernel, memory in list_conditions(is_emulated):
                faults = KERNEL_FAULTS[kernel]
                found = run_cell(pipe, prompt, memory=memory, faults=faults, **arguments)
                cells.append(Cell(dtype, attention, kernel, memory, **found))
    return tuple(cells)


def load_for_trial(model, backend, dtype, attention):
    """Loads a pipeline that may break: (pipe, whether its device is to be emulated)."""
    with allow_unsafe_attention():
        pipe, report = load_pipeline(
            model, backend=backend, dtype=dtype, attention=attention, progress=False
        )
    return pipe, report.device == "cpu"


def run_cell(pipe, prompt, *, memory, faults, **arguments) -> dict:
    """One image on one device: {problem, stage, step, emulated, image}.

    Args:
        pipe: The pipeline, which may break.
        prompt: What to draw.
        memory: What fresh memory holds.
        faults: Of the emulated device; None is the real one.
        **arguments: For `generate`.
    """
    with allow_unsafe_attention(), on_device(memory, faults):
        record = generate(pipe, prompt, on_nonfinite="skip", progress=False, **arguments)
    image = record.images[0]
    finding = image.finding or {}
    return {
        "problem": image.problem,
        "stage": finding.get("stage"),
        "step": finding.get("step"),
        "emulated": record.emulated,
        "image": image.pil_image,
    }


@contextmanager
def on_device(memory, faults=None):
    """Runs the body on the emulated Mac, or on the real device with memory as far as it goes.

    Args:
        memory: One of `EMULATED_MEMORIES` or, on a real device, of `REAL_MEMORIES`.
        faults: Of the emulated device; None is the real one.
    """
    if faults is not None:
        with ExitStack() as stack:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", EmulationWarning)  # whoever calls says it
                stack.enter_context(mps(memory, faults))
            yield
        return
    fills = {"as it comes": nullcontext, "zeros": ZeroedMemory, "nan": nan_filled_memory}
    with fills[memory]():
        yield


def save_outcomes(path, cells, *, model, environment, settings, verdicts=()) -> Path:
    """Writes what a machine gave as JSON to send in: versions and outcomes, nothing personal.

    Args:
        path: Where to.
        cells: What was run.
        model: Its name; of a path the last part alone is kept.
        environment: From `describe_environment`.
        settings: Numbers of the run, such as the seed and the steps.
        verdicts: What was concluded, JSON types.

    Returns:
        The path.
    """
    path = Path(path)
    content = {
        "version": FORMAT_VERSION,
        "model": Path(str(model)).name,
        "environment": environment,
        "settings": settings,
        "cells": [cell.to_dict() for cell in cells],
        "verdicts": list(verdicts),
    }
    with replace_file(path) as temporary:
        temporary.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    return path

"""What a dtype costs on the device at hand: seconds and memory, natively, never under emulation."""

import time
from dataclasses import dataclass

import torch

from sdkit.device import synchronize
from sdkit.emulate.mode import suspended
from sdkit.loading import load_pipeline
from sdkit.loading.modules import find_models
from sdkit.loading.recipe import count_bytes
from sdkit.memory.live_bytes import LiveBytes

MIB = 2**20
LONG_SECONDS = 10  # beside this a warm-up is nothing, and native float16 on a CPU takes as long
COMPARED = ("float32", "bfloat16", "float16")


@dataclass(frozen=True)
class Cost:
    """One image in one dtype.

    Attributes:
        dtype: Of the whole pipeline.
        device: What it was measured on, such as "cpu".
        seconds: Of one image, after one that warms up; of the first, if that took 10 s.
        weights_mib: Of all weights.
        peak_mib: Most that weights and tensors took together, between two ops; what an op takes
            for itself and what an allocator keeps are not in it.
    """

    dtype: str
    device: str
    seconds: float
    weights_mib: float
    peak_mib: float


def measure_costs(
    model, prompt, *, backend="auto", dtypes=COMPARED, seed=0, **pipe_kwargs
) -> dict[str, Cost]:
    """Draws one image in each dtype on the device itself.

    Args:
        model: As in `load_pipeline`.
        prompt: What to draw.
        backend: As in `load_pipeline`.
        dtypes: Which; a device's own arithmetic, so that float16 on a CPU takes its time.
        seed: Of the noise.
        **pipe_kwargs: For the pipeline call; a few steps suffice to compare.

    Returns:
        {dtype: Cost}.
    """
    costs = {}
    for dtype in dtypes:
        pipe, report = load_pipeline(model, backend=backend, dtype=dtype, progress=False)
        pipe.set_progress_bar_config(disable=True)

        def draw(pipe=pipe):
            generator = torch.Generator("cpu").manual_seed(seed)
            pipe(prompt, generator=generator, output_type="np", **pipe_kwargs)
            synchronize(pipe._execution_device)

        with suspended():
            live = LiveBytes(*find_models(pipe).values())
            with live:
                seconds = measure_seconds(draw)
            if seconds < LONG_SECONDS:
                seconds = measure_seconds(draw)
        weights = count_bytes(pipe)
        peak = weights + live.peak_bytes
        costs[dtype] = Cost(dtype, report.device, seconds, weights / MIB, peak / MIB)
    return costs


def measure_seconds(draw) -> float:
    """Wall time of one call."""
    started = time.perf_counter()
    draw()
    return time.perf_counter() - started

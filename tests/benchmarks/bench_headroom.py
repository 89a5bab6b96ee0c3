"""What measuring the headroom costs: the same generation, plain and with every op's range recorded.

On the CPU the clock is the process's own, for another program's load would only add.
"""

import time

import torch
from pairs import measure_pairs, summarize

from sdkit import load_pipeline, measure_headroom

PAIRS, STEPS, LIMIT = 10, 8, "<= 3"


def measure() -> list[dict]:
    """One row: `measure_headroom` beside a plain pipeline call."""
    pipe, report = load_pipeline("mini", dtype="float32", progress=False)
    pipe.set_progress_bar_config(disable=True)

    def plain():
        generator = torch.Generator("cpu").manual_seed(0)
        pipe("black casual shoes", num_inference_steps=STEPS, generator=generator)

    def measured():
        measure_headroom(pipe, "black casual shoes", num_inference_steps=STEPS)

    clock = time.process_time if report.device == "cpu" else time.perf_counter
    return [
        {
            "benchmark": "headroom",
            "case": f"mini, {STEPS} steps, float32, {report.device}",
            "baseline": "plain pipeline call",
            "ours": "measure_headroom",
            **summarize(measure_pairs(plain, measured, pairs=PAIRS, clock=clock)),
            "limit": LIMIT,
        }
    ]

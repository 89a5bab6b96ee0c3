"""What the guard costs: the same generation with and without it, in pairs, in one process.

On the CPU the clock is the process's own, for another program's load would only add. Single pairs
still differ by some 5 %: the median of 40 is good to about 1 %.
"""

import time

import torch
from pairs import measure_pairs, summarize

from sdkit import guard, load_pipeline

PAIRS, STEPS, LIMIT = 40, 8, "<= 1.03"


def measure() -> list[dict]:
    """One row: a guarded pipeline call beside an unguarded one."""
    pipe, report = load_pipeline("mini", dtype="float32", progress=False)
    pipe.set_progress_bar_config(disable=True)

    def plain():
        generator = torch.Generator("cpu").manual_seed(0)
        pipe("black casual shoes", num_inference_steps=STEPS, generator=generator)

    def guarded():
        with guard(pipe):
            plain()

    clock = time.process_time if report.device == "cpu" else time.perf_counter
    return [
        {
            "benchmark": "guard",
            "case": f"{STEPS} steps, float32, {report.device}",
            "baseline": "plain pipeline call",
            "ours": "under guard",
            **summarize(measure_pairs(plain, guarded, pairs=PAIRS, clock=clock)),
            "limit": LIMIT,
        }
    ]

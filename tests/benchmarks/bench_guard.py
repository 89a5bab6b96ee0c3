"""What the guard costs: the same generation with and without it, in pairs, in one process.

    python tests/benchmarks/bench_guard.py [MODEL]

The order within a pair alternates, so that warming up falls on both alike. On the CPU the clock is
the process's own, and the least of each side is told, for another program's load only ever adds:
single pairs differ by 10 %. The ratio may be 1.03 at most.
"""

import sys
import time

import torch

from sdkit import guard, load_pipeline

PAIRS, STEPS, LIMIT = 15, 8, 1.03


def measure(model="mini") -> list[dict]:
    """One row: a guarded pipeline call beside an unguarded one."""
    pipe, report = load_pipeline(model, dtype="float32", progress=False)
    pipe.set_progress_bar_config(disable=True)
    _measure_seconds(pipe, guarded=True)  # warm-up
    pairs = [_measure_pair(pipe, guarded_first=pair % 2 == 0) for pair in range(PAIRS)]
    plain_seconds, guarded_seconds = map(min, zip(*pairs, strict=True))
    return [
        {
            "benchmark": "guard",
            "case": f"{STEPS} steps, float32, {report.device}, {PAIRS} pairs",
            "baseline": "plain pipeline call",
            "baseline_seconds": plain_seconds,
            "ours": "under guard",
            "ours_seconds": guarded_seconds,
            "ratio": guarded_seconds / plain_seconds,
        }
    ]


def _measure_pair(pipe, *, guarded_first):
    """(plain seconds, guarded seconds)."""
    order = (True, False) if guarded_first else (False, True)
    seconds = {guarded: _measure_seconds(pipe, guarded=guarded) for guarded in order}
    return seconds[False], seconds[True]


def _measure_seconds(pipe, *, guarded):
    call = {"num_inference_steps": STEPS, "generator": torch.Generator("cpu").manual_seed(0)}
    clock = time.process_time if pipe.device.type == "cpu" else time.perf_counter
    started = clock()
    if guarded:
        with guard(pipe):
            pipe("black casual shoes", **call)
    else:
        pipe("black casual shoes", **call)
    return clock() - started


if __name__ == "__main__":
    (row,) = measure(*sys.argv[1:])
    print("\n".join(f"{name:17} {value}" for name, value in row.items()))
    sys.exit(row["ratio"] > LIMIT)

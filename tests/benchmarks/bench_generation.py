"""Seconds an image on the bundled model in float32: `generate` beside the plain pipeline call."""

import time

import torch

from sdkit import generate, load_pipeline

PROMPT = "A professional product photo of black casual shoes on a grey background"
REPEATS = 4


def measure() -> list[dict]:
    """One row: plain diffusers against `generate` (guard, checks, provenance), alternated."""
    pipe, report = load_pipeline("mini", dtype="float32")
    pipe.set_progress_bar_config(disable=True)

    def plain():
        pipe(PROMPT, num_inference_steps=25, generator=torch.Generator("cpu").manual_seed(0))

    def ours():
        generate(pipe, PROMPT, num_inference_steps=25, progress=False)

    seconds = {plain: [], ours: []}
    for call in (plain, ours) * (REPEATS + 1):
        started = time.perf_counter()
        call()
        seconds[call].append(time.perf_counter() - started)
    plain_seconds, our_seconds = (min(seconds[call][1:]) for call in (plain, ours))
    return [
        {
            "benchmark": "one image",
            "case": f"mini, 25 steps, float32, {report.device}",
            "baseline": "plain pipeline call",
            "baseline_seconds": plain_seconds,
            "ours": "generate",
            "ours_seconds": our_seconds,
            "ratio": our_seconds / plain_seconds,
        }
    ]


if __name__ == "__main__":
    print(*measure(), sep="\n")

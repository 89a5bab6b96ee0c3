"""Seconds an image on the bundled model in float32: `generate` beside the plain pipeline call."""

import torch
from pairs import measure_pairs, summarize

from sdkit import generate, load_pipeline

PROMPT = "A professional product photo of black casual shoes on a grey background"
PAIRS = 5


def measure() -> list[dict]:
    """One row: plain diffusers against `generate` (guard, checks, provenance), alternated."""
    pipe, report = load_pipeline("mini", dtype="float32")
    pipe.set_progress_bar_config(disable=True)

    def plain():
        pipe(PROMPT, num_inference_steps=25, generator=torch.Generator("cpu").manual_seed(0))

    def ours():
        generate(pipe, PROMPT, num_inference_steps=25, progress=False)

    return [
        {
            "benchmark": "one image",
            "case": f"mini, 25 steps, float32, {report.device}",
            "baseline": "plain pipeline call",
            "ours": "generate",
            **summarize(measure_pairs(plain, ours, pairs=PAIRS)),
            "limit": "",
        }
    ]

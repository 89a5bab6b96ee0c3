"""A move of the explorer's slider beside building the view, and what recording adds to a run.

The map has 100 steps and 1000 modules: twice a long run of Stable Diffusion 1.5. Seconds are this
process's own; the browser then draws one marker and two small pictures.
"""

import time
from dataclasses import replace

import numpy as np
from pairs import measure_pairs, summarize

from sdkit import explore_run, generate, load_pipeline
from sdkit.exploration.explorer import RunExplorer
from sdkit.exploration.material import Material, make_steps

STEPS, MODULES = 100, 1000
PROMPT = "A professional product photo of black casual shoes on a grey background"


def measure() -> list[dict]:
    """Two rows: a move of the slider, and `generate` with its steps recorded."""
    return [measure_move(), measure_recording()]


def measure_move():
    """The slider, one step on; the view with its map and its list of modules is built once."""
    random = np.random.default_rng(0)
    names = [f"unet.down_blocks.{m // 50}.attentions.{m % 50}.to_out" for m in range(MODULES)]
    steps = make_steps((), names, STEPS)
    steps.largest[:] = 2.0 ** random.uniform(-4, 15, (STEPS, MODULES))
    steps.total[:] = 1
    latents = random.normal(size=(1, STEPS, 4, 64, 64)).astype(np.float16)
    material = Material("a run", steps=(replace(steps, latents=latents, images=(0,)),))
    view = RunExplorer(material)

    def move():
        view.step.value = (view.step.value + 1) % STEPS

    row = summarize(
        measure_pairs(lambda: RunExplorer(material), move, pairs=30, clock=time.process_time)
    )
    return {
        "benchmark": "explorer",
        "case": f"a move of the slider, {STEPS} steps x {MODULES} modules",
        "baseline": "building the view",
        "ours": "one move",
        **row,
        "limit": "<= 0.5",
    }


def measure_recording():
    """`generate` with every module's range recorded; the bundled model's ops are small."""
    pipe, report = load_pipeline("mini", dtype="float32")
    pipe.set_progress_bar_config(disable=True)

    def run(**recording):
        record = generate(pipe, PROMPT, num_inference_steps=12, progress=False, **recording)
        if recording:
            explore_run(record)

    pairs = measure_pairs(run, lambda: run(record_steps=True), pairs=5, clock=time.process_time)
    return {
        "benchmark": "explorer",
        "case": f"mini, 12 steps, float32, {report.device}",
        "baseline": "generate",
        "ours": "generate(record_steps=True) and explore_run",
        **summarize(pairs),
        "limit": "",
    }

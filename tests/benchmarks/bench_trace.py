"""What looking costs, level by level, beside transformers' DebugUnderflowOverflow and autograd's
detect_anomaly; what a whole diagnosis costs in generations; and who names the producer.

On the CPU the clock is the process's own, for another program's load would only add.
"""

import contextlib
import copy
import io
import os
import sys
import tempfile
import time
from pathlib import Path

import torch
from pairs import measure_pairs, summarize
from transformers.debug_utils import DebugUnderflowOverflow

from sdkit import diagnose, guard, load_pipeline
from sdkit.diagnosis.module_watch import ModuleWatch
from sdkit.diagnosis.trace import find_first_bad_op
from sdkit.diagnosis.training_step import diagnose_training_step
from sdkit.emulate import float16_arithmetic
from sdkit.guarding import find_components

PAIRS, STEPS = 12, 8
DIAGNOSIS_LIMIT = "<= 2"  # generations, to name the op
CLOCK = time.process_time


def measure() -> list[dict]:
    """Rows of overheads, then of a diagnosis in generations, then of producers named."""
    pipe, _ = load_pipeline("mini", dtype="float32", backend="cpu", progress=False)
    pipe.set_progress_bar_config(disable=True)
    return [*measure_levels(pipe), *measure_backward(pipe), measure_diagnosis(), *count_named()]


def measure_levels(pipe) -> list[dict]:
    """One UNet call of two latents, as guidance makes it, watched in four ways."""
    unet = pipe.unet
    call = make_unet_call(unet)
    debugged = copy.deepcopy(unet)
    debugger = DebugUnderflowOverflow(debugged)
    debugged_call = make_unet_call(debugged)

    def under_guard():
        with guard(pipe):
            call()

    def under_module_watch():
        with ModuleWatch().installed({"unet": unet}):
            call()

    def under_op_trace():
        assert find_first_bad_op(call, {"unet": unet}) is None

    def under_debugger():
        debugger.reset_saved_frames()
        debugged_call()

    ways = {
        "guard (stages)": under_guard,
        "module watch": under_module_watch,
        "op trace": under_op_trace,
        "DebugUnderflowOverflow": under_debugger,
    }
    return [
        make_row(
            "watching one UNet call",
            name,
            "unwatched",
            measure_pairs(call, way, pairs=PAIRS, clock=CLOCK),
        )
        for name, way in ways.items()
    ]


def make_unet_call(unet):
    """A function that calls a UNet as StableDiffusionPipeline does."""
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(2, 4, 16, 16, generator=generator)
    prompt_embeds = torch.randn(2, 77, unet.config.cross_attention_dim, generator=generator)

    def call():
        with torch.no_grad():
            return unet(latents, torch.tensor(501), encoder_hidden_states=prompt_embeds)

    return call


def measure_backward(pipe) -> list[dict]:
    """A training step of the UNet, plain, under detect_anomaly and under the op trace."""
    unet = copy.deepcopy(pipe.unet)
    latents, prompt_embeds = torch.randn(2, 4, 16, 16), torch.randn(2, 77, 128)

    def measure_loss():
        return (
            unet(latents, torch.tensor(501), encoder_hidden_states=prompt_embeds)
            .sample.square()
            .mean()
        )

    def step():
        measure_loss().backward()
        unet.zero_grad()

    def under_anomaly():
        with torch.autograd.detect_anomaly(check_nan=True):
            step()

    def under_op_trace():
        assert diagnose_training_step(measure_loss, {"unet": unet}).is_healthy

    ways = {
        "torch.autograd.detect_anomaly": under_anomaly,
        "op trace, forward and backward": under_op_trace,
    }
    return [
        make_row(
            "watching one training step",
            name,
            "unwatched",
            measure_pairs(step, way, pairs=PAIRS // 2, clock=CLOCK),
        )
        for name, way in ways.items()
    ]


def measure_diagnosis() -> dict:
    """From the prompt to the op's name, on a float16 fault of the last step, the dearest case."""
    pipe, _ = load_pipeline("mini", dtype="float16", backend="cpu", progress=False)
    pipe.set_progress_bar_config(disable=True)
    vae = pipe.vae.decoder.up_blocks[-1].resnets[-1]
    with torch.no_grad():
        vae.conv1.weight *= 2.0**14

    def generate_blindly():
        pipe(
            "black casual shoes",
            num_inference_steps=STEPS,
            generator=torch.Generator().manual_seed(0),
        )

    def name_the_op():
        found = diagnose(pipe, "black casual shoes", num_inference_steps=STEPS)
        assert found.module.startswith("vae.decoder.up_blocks.3"), found

    with float16_arithmetic():
        measured = measure_pairs(generate_blindly, name_the_op, pairs=3, clock=CLOCK)
    return {
        **make_row("diagnosis", "named: a float16 overflow in the VAE", "one generation", measured),
        "limit": DIAGNOSIS_LIMIT,
    }


def make_row(benchmark, ours, baseline, measured) -> dict:
    return {
        "benchmark": benchmark,
        "case": f"mini, cpu, {'emulated float16' if benchmark == 'diagnosis' else 'float32'}",
        "baseline": baseline,
        "ours": ours,
        **summarize(measured),
    }


def count_named() -> list[dict]:
    """How many planted faults each names by the module that made the first bad value."""
    sys.path.insert(0, str(Path(__file__).parent.parent))
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    from planted import PLANTED
    from tiny_pipelines import write_tokenizer

    with tempfile.TemporaryDirectory() as folder:
        write_tokenizer(Path(folder))
        cases = [
            c
            for c in PLANTED
            if c.stage in ("text_encoder", "unet", "vae") and c.cause != "bad-input"
        ]
        by_debugger = sum(is_named_by_debugger(case, Path(folder)) for case in cases)
        by_diagnose = sum(is_named_by_diagnose(case, Path(folder)) for case in cases)
    return [
        {
            "benchmark": "producer named",
            "case": f"{len(cases)} planted faults",
            "baseline": "DebugUnderflowOverflow",
            "ours": "diagnose",
            "baseline_named": by_debugger,
            "ours_named": by_diagnose,
        }
    ]


def is_named_by_diagnose(case, folder) -> bool:
    with case.build(folder) as (pipe, pipe_kwargs):
        found = diagnose(pipe, case.prompts, **pipe_kwargs)
        return found.module in {case.module, *(module for _, module in case.also)}


def is_named_by_debugger(case, folder) -> bool:
    """The module of its last frame, which is the one it stopped at."""
    from planting import draw

    with case.build(folder) as (pipe, pipe_kwargs), contextlib.redirect_stdout(io.StringIO()):
        stopped_at = []
        for name, component in find_components(pipe).items():
            debugger = DebugUnderflowOverflow(component)
            create_frame = debugger.create_frame

            def note(module, *tensors, name=name, debugger=debugger, create_frame=create_frame):
                create_frame(module, *tensors)
                if debugger.detected_overflow:
                    stopped_at.append(f"{name}.{debugger.module_names[module]}".rstrip("."))

            debugger.create_frame = note
        with contextlib.suppress(ValueError):
            draw(pipe, case.prompts, **pipe_kwargs)
        return stopped_at[:1] == [case.module]

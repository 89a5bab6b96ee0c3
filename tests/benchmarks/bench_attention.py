"""Sliced attention of our own beside SDPA, diffusers' slicing and the plain processor, at SD 1.5.

float32 on the CPU, where SDPA never makes the scores; on MPS it does, so there what SDPA takes is
nearer to the plain processor. Seconds of calls in turn; peak of live tensors (`LiveBytes`) and of
the process (high-water mark of a fresh one, less what it held before the call).
"""

import json
import os
import subprocess
import sys

import torch
from diffusers.models.attention_processor import (
    Attention,
    AttnProcessor,
    AttnProcessor2_0,
    SlicedAttnProcessor,
)
from pairs import measure_pairs, summarize

from sdkit.memory import LiveBytes
from sdkit.slicing import SafeSlicedAttnProcessor

PAIRS, BUDGET_SECONDS = 5, 30
LAYERS = {  # (tokens or image, context, heads): 512x512, both rows of guidance
    "UNet self 4096x320": ((2, 4096, 320), None, 8),
    "UNet cross 4096x320": ((2, 4096, 320), (2, 77, 768), 8),
    "UNet self 1024x640": ((2, 1024, 640), None, 8),
    "VAE self 4096x512": ((1, 512, 64, 64), None, 1),
}
PROCESSORS = {
    "SDPA": AttnProcessor2_0(),
    "plain": AttnProcessor(),
    "diffusers' slicing": SlicedAttnProcessor(1),  # "max": its smallest slices
    "sdkit": SafeSlicedAttnProcessor(),
}
PROGRAM = """
import json, sys
from pathlib import Path
from bench_attention import LAYERS, PROCESSORS, make_call

def read_status(name):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name))

layer, processor = sys.argv[1:]
make_call((1, 64, 64), None, 8, PROCESSORS[processor])()  # what a first call sets up
call = make_call(*LAYERS[layer], PROCESSORS[processor])
started = read_status("VmRSS:")
call()
print(json.dumps(read_status("VmHWM:") - started))
"""


def make_call(shape, context, heads, processor):
    """Returns a function of no arguments that runs a layer once."""
    torch.manual_seed(0)
    width = shape[1] if len(shape) == 4 else shape[2]
    norms = {"norm_num_groups": 32, "residual_connection": True} if len(shape) == 4 else {}
    layer = Attention(
        query_dim=width, cross_attention_dim=context and context[2], heads=heads,
        dim_head=width // heads, processor=processor, bias=len(shape) == 4, **norms,
    ).eval()  # fmt: skip
    inputs = [torch.randn(size) for size in (shape, context) if size]

    def call():
        with torch.no_grad():
            return layer(*inputs)

    return call


def measure():
    """Returns three rows a layer, ours against each other; `ratio` is ours over theirs in peak.

    The limit is on live tensors against diffusers' slicing: at or below.
    """
    rows = []
    for name, layer in LAYERS.items():
        peaks, processes = {}, {}
        for kind, processor in PROCESSORS.items():
            with LiveBytes() as live:
                make_call(*layer, processor)()
            peaks[kind] = live.peak_bytes
            processes[kind] = measure_process(name, kind)
        for kind in ("SDPA", "plain", "diffusers' slicing"):
            measured = measure_pairs(
                make_call(*layer, PROCESSORS[kind]), make_call(*layer, PROCESSORS["sdkit"]),
                pairs=PAIRS, budget_seconds=BUDGET_SECONDS,
            )  # fmt: skip
            summary = summarize(measured)
            rows.append({
                "benchmark": "sliced attention", "case": f"{name}, float32, CPU",
                "baseline": kind, "ours": "sdkit.slicing", **summary,
                "time_ratio": summary["ratio"], "ratio": peaks["sdkit"] / peaks[kind],
                "limit": "<= 1" if kind == "diffusers' slicing" else "",
                "baseline_peak_gib": processes[kind] / 2**30,
                "ours_peak_gib": processes["sdkit"] / 2**30,
            })  # fmt: skip
    return rows


def measure_process(layer, kind):
    """Peak bytes that one call adds to a fresh process."""
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(
            [os.path.dirname(__file__), os.environ.get("PYTHONPATH", "")]
        ),
        "MALLOC_MMAP_THRESHOLD_": "65536",  # else glibc keeps what is freed
    }
    result = subprocess.run(
        [sys.executable, "-c", PROGRAM, layer, kind],
        capture_output=True, text=True, check=True, env=environment,
    )  # fmt: skip
    return json.loads(result.stdout.splitlines()[-1])

"""Peak memory as predicted from shapes, beside what a fresh process really takes.

Models with random weights of the exact configuration, float32, on the CPU. The process's own
high-water mark is read (VmHWM), less what it held before the weights were made: so it has in it
what ops take for themselves and what the allocator keeps, which a prediction from shapes has not.
"""

import json
import os
import subprocess
import sys

from sdkit.memory import LoraTraining
from sdkit.precision.memory import predict_memory

LIMIT_PERCENT = 10
CASES = {  # name: (model, image size, training)
    "mini, one image": ("mini", 128, None),
    "mini, LoRA step": ("mini", 128, LoraTraining()),
    "SD 1.5, one image": ("sd15", 512, None),
    "SD 1.5, LoRA step": ("sd15", 512, LoraTraining()),
    "SD 1.5, LoRA step, checkpointing": ("sd15", 512, LoraTraining(gradient_checkpointing=True)),
}
PROGRAM = """
import json, sys
from dataclasses import asdict
from pathlib import Path
import torch
from sdkit import load_pipeline
from sdkit.memory import LoraTraining, build_architecture, trace_inference, trace_training
from sdkit.memory.live_bytes import LiveBytes

def read_status(name):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name))

model, size, training = json.loads(sys.argv[1])
torch.nn.functional.silu(torch.ones(1))
started = read_status("VmRSS:")
if model == "mini":
    pipe, _ = load_pipeline("mini", backend="cpu", dtype="float32", progress=False)
    components = {n: m for n, m in pipe.components.items() if isinstance(m, torch.nn.Module)}
else:
    components = build_architecture(model, device="cpu")
weights = sum(p.nbytes for m in components.values() for p in m.parameters())
options = {"latent_size": (size // 8, size // 8)}
if training:
    stages = trace_training(components, LoraTraining(**training), **options)
else:
    stages = trace_inference(components, **options)
print(json.dumps({
    "live": weights + max(stages.values()), "stages": stages,
    "process": read_status("VmHWM:") - started,
}))
"""


def measure_in_a_process(model, size, training=None):
    """Runs every stage once, on real tensors, in a process of its own.

    Args:
        model: "mini", "sd15" or "sdxl".
        size: Of the image, in pixels.
        training: A LoraTraining, or None for a generation.

    Returns:
        {"live": peak bytes of tensors with the weights, "stages": the same by stage without them,
        "process": peak of resident memory, less what it was before the model}.
    """
    case = json.dumps([model, size, vars(training) if training else None])
    # Without it glibc keeps what is freed, and the mark shows the allocator instead of the model.
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"}
    result = subprocess.run(
        [sys.executable, "-c", PROGRAM, case],
        capture_output=True, text=True, check=True, env=environment,
    )  # fmt: skip
    return json.loads(result.stdout.splitlines()[-1])


def measure():
    """Returns one row a case; `ratio` is predicted over measured."""
    rows = []
    for name, (model, size, training) in CASES.items():
        predicted = predict_memory(
            model, image_size=size, training=training, device_type="cpu", dtype="float32"
        )
        measured = measure_in_a_process(model, size, training)
        for source, value in (("tensors alive", "live"), ("process", "process")):
            rows.append({
                "benchmark": "memory predicted", "case": f"{name}, {source}",
                "baseline": f"measured, {source}", "ours": "predict_memory",
                "baseline_gib": measured[value] / 2**30, "ours_gib": predicted.total_gib,
                "ratio": predicted.total_bytes / measured[value],
            })  # fmt: skip
    return rows

"""What a rescue costs: a bfloat16 run in which 30 % of the UNet's calls must be made again.

Real bfloat16 on the CPU, so seconds mean something. The fault is a hook that spoils every third or
fourth call while the weights are bfloat16.
"""

import time

import torch
from pairs import measure_pairs, summarize

from sdkit import generate, load_pipeline

PAIRS, STEPS, LIMIT = 5, 19, "<= 1.5"  # PNDM makes 20 calls of 19 steps
SPOILED = (1, 4, 7, 11, 14, 18)  # 30 % of 20


def measure() -> list[dict]:
    """One row: generate with rescues beside generate without a fault."""
    pipe, _ = load_pipeline("mini", dtype="bfloat16", backend="cpu", progress=False)
    calls = []

    def spoil(module, args, output):
        if output.dtype is torch.bfloat16:
            calls.append(1)
            if (len(calls) - 1) % 20 in SPOILED:
                output[0, 0, 0, 0] = float("nan")

    def healthy():
        generate(pipe, "black casual shoes", num_inference_steps=STEPS, progress=False)

    def rescued():
        calls.clear()
        handle = pipe.unet.conv_out.register_forward_hook(spoil)
        record = generate(
            pipe, "black casual shoes", num_inference_steps=STEPS, progress=False,
            on_nonfinite="rescue",
        )  # fmt: skip
        handle.remove()
        assert len(record.rescue["rescues"]) == len(SPOILED), record

    measured = measure_pairs(healthy, rescued, pairs=PAIRS, clock=time.process_time)
    return [
        {
            "benchmark": "rescue",
            "case": f"mini, bfloat16, cpu, {len(SPOILED)} of 20 UNet calls in float32",
            "baseline": "generate, no fault",
            "ours": "generate, rescued",
            **summarize(measured),
            "limit": LIMIT,
        }
    ]

"""Emulated against native float16 on the CPU, at the sizes of Stable Diffusion 1.5, in one run."""

import torch
import torch.nn.functional as F
from pairs import measure_pairs, summarize

from sdkit.emulate import float16_arithmetic

# A native convolution takes a minute on one core, so it gets the least number of pairs.
PAIRS, BUDGET_SECONDS = 9, 15
LIMIT = ">= 20"


def make_half(*shape):
    """A normal float16 sample, equal on every run."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)).half()


def make_cases():
    """Return `{case: (function, limit)}`: what SD 1.5 does at 512x512 with one image.

    Attention and elementwise ops have no limit: the latter buy correct rounding, below 1.
    """
    tokens, weight = make_half(4096, 320), make_half(320, 1280)
    image, kernel = make_half(1, 320, 64, 64), make_half(320, 320, 3, 3)
    query = key = value = make_half(1, 8, 1024, 80)

    def attention():
        return F.scaled_dot_product_attention(query, key, value)

    return {
        "matmul 4096x320 @ 320x1280": (lambda: tokens @ weight, LIMIT),
        "conv 320 channels 64x64 3x3": (lambda: F.conv2d(image, kernel, padding=1), LIMIT),
        "attention 8 heads 1024 tokens": (attention, ""),
        "silu 320x64x64": (lambda: F.silu(image), ""),
    }


def measure():
    """Time each case natively and emulated, side by side.

    Returns:
        One row a case; `ratio` is native over emulated seconds, so above 1 the emulation is faster.
    """
    rows = []
    for case, (function, limit) in make_cases().items():

        def emulated(function=function):
            with float16_arithmetic():
                function()

        measured = measure_pairs(function, emulated, pairs=PAIRS, budget_seconds=BUDGET_SECONDS)
        rows.append({
            "benchmark": "emulated float16", "case": case,
            "baseline": "native float16 on the CPU", "ours": "sdkit.emulate.float16_arithmetic",
            **summarize(measured, speedup=True), "limit": limit,
        })  # fmt: skip
    return rows

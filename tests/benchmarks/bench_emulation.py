"""Emulated against native float16 on the CPU, at the sizes of Stable Diffusion 1.5, in one run."""

import time

import torch
import torch.nn.functional as F

from sdkit.emulate import float16_arithmetic

# Native float16 takes seconds where the emulation takes milliseconds: repeat only the latter.
REPEATS_NATIVE = 1
REPEATS_OURS = 5


def make_half(*shape):
    """A normal float16 sample, equal on every run."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)).half()


def make_cases():
    """Return `{case: function}`: what SD 1.5 does at 512x512 with one image."""
    tokens, weight = make_half(4096, 320), make_half(320, 1280)
    image, kernel = make_half(1, 320, 64, 64), make_half(320, 320, 3, 3)
    query = key = value = make_half(1, 8, 1024, 80)
    return {
        "matmul 4096x320 @ 320x1280": lambda: tokens @ weight,
        "conv 320 channels 64x64 3x3": lambda: F.conv2d(image, kernel, padding=1),
        "attention 8 heads 1024 tokens": lambda: F.scaled_dot_product_attention(query, key, value),
        "silu 320x64x64": lambda: F.silu(image),
    }


def measure_seconds(function, repeats):
    """Least of the seconds of some runs, the one with the least of other programs in it."""
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        function()
        seconds.append(time.perf_counter() - start)
    return min(seconds)


def measure():
    """Time each case natively and emulated, side by side.

    Returns:
        One row a case; `ratio` is native over emulated seconds, so above 1 the emulation is faster.
        Elementwise ops are expected below 1: they buy correct rounding.
    """
    rows = []
    for case, function in make_cases().items():
        with float16_arithmetic():
            function()
            ours_seconds = measure_seconds(function, REPEATS_OURS)
        baseline_seconds = measure_seconds(function, REPEATS_NATIVE)
        rows.append({
            "benchmark": "emulated float16", "case": case,
            "baseline": "native float16 on the CPU", "baseline_seconds": baseline_seconds,
            "ours": "sdkit.emulate.float16_arithmetic", "ours_seconds": ours_seconds,
            "ratio": baseline_seconds / ours_seconds,
        })  # fmt: skip
    return rows


if __name__ == "__main__":
    for row in measure():
        print(
            f"{row['case']:32} native {row['baseline_seconds']:9.4f} s"
            f"   emulated {row['ours_seconds']:9.4f} s   {row['ratio']:8.1f}x"
        )

"""What must not be read: inputs that beta=0 excludes, memory that nobody wrote."""

import torch

from sdkit.attention import count_leaks
from sdkit.diagnosis.probes.probe import HALF, SINGLE, Check, Probe, compare, compare_with, draw
from sdkit.emulate import suspended
from sdkit.emulate.faults.fault import DIFFUSERS, PYTORCH
from sdkit.emulate.memory import nan_filled_memory

NAN = float("nan")


def measure_leaks(multiply):
    """Makes the measurement of one of the products with beta=0."""

    def measure(device, thorough):
        return [Check(f"{case}: NaN", n) for case, n in count_leaks(multiply, device).items()]

    return measure


def attend_through_a_buffer(query, key, value):
    """Attention as diffusers computes it without SDPA."""
    # B batch, L tokens, D width
    size = query.shape[1]
    buffer = torch.empty(len(query), size, size, dtype=query.dtype, device=query.device)  # B, L, L
    scores = torch.baddbmm(buffer, query, key.mT, beta=0, alpha=query.shape[-1] ** -0.5)
    return scores.softmax(-1) @ value  # B, L, D


def measure_recycled_memory(device, thorough):
    length = 4096 if thorough else 64
    inputs = [draw(2, length, 40, seed=seed) for seed in range(3)]
    junk = torch.full((2, length, length), NAN, dtype=HALF, device=device)
    del junk  # the next buffer of this size may well be this one
    found = torch.empty(2, length, length, dtype=HALF, device=device).cpu()
    with suspended():
        share = found.isfinite().logical_not().double().mean().item()
    del found
    recycled = compare("recycled buffer", attend_through_a_buffer, *inputs, device=device)
    with nan_filled_memory():
        filled = compare("NaN in fresh memory", attend_through_a_buffer, *inputs, device=device)
    told = Check("share of NaN or Inf that a fresh buffer held", share, allowed=1)  # any is honest
    return told, *recycled, *filled


def measure_large_inner_size(device, thorough):
    # K inner, around the size from which the last tile was not clipped; it is read on into NaN.
    checks = []
    for dtype in (HALF, SINGLE):
        for inner in (32766, 32767, 32769):
            left, right = draw(9, inner, seed=1).to(dtype), draw(inner, 8, seed=2).to(dtype)
            on_device = [surround_with_nan(matrix, device) for matrix in (left, right)]
            batched = [matrix[None] for matrix in on_device]
            with suspended():
                reference = left.double() @ right.double()
            for name, factors in (("mm", on_device), ("bmm", batched)):
                product = torch.matmul(*factors).reshape(9, 8)
                case = f"{name} {str(dtype).removeprefix('torch.')} K={inner}"
                checks += compare_with(case, product, reference)
    return checks


def surround_with_nan(matrix, device):
    """Copies a matrix to the device, into the middle of memory that is NaN."""
    around = torch.full((3 * matrix.numel(),), NAN, dtype=matrix.dtype, device=device)
    middle = around[matrix.numel() : 2 * matrix.numel()]
    return middle.copy_(matrix.flatten()).view(matrix.shape)


PROBES = (
    Probe(
        name="baddbmm-beta-zero",
        contract="baddbmm with beta=0 ignores its input, whatever it holds.",
        guards=("attention slicing", "float16"),
        threads=(f"{PYTORCH}/187521", f"{DIFFUSERS}/11229", f"{DIFFUSERS}/14438"),
        measure=measure_leaks(torch.baddbmm),
    ),
    Probe(
        name="addbmm-beta-zero",
        contract="addbmm with beta=0 ignores its input, whatever it holds.",
        guards=("attention",),
        threads=(f"{PYTORCH}/96037",),
        measure=measure_leaks(torch.addbmm),
    ),
    Probe(
        name="addmm-beta-zero",
        contract="addmm with beta=0 ignores its input, whatever it holds.",
        guards=("attention", "training"),
        threads=(f"{PYTORCH}/94534", f"{PYTORCH}/80588"),
        measure=measure_leaks(torch.addmm),
    ),
    Probe(
        name="recycled-memory",
        contract="Attention does not depend on what uninitialised memory held.",
        guards=("attention slicing", "float16"),
        threads=(f"{PYTORCH}/187521", f"{DIFFUSERS}/14459", f"{DIFFUSERS}/2643"),
        measure=measure_recycled_memory,
    ),
    Probe(
        name="matmul-large-inner-size",
        contract="A matrix product reads nothing behind its operands in memory.",
        guards=("attention", "training"),
        threads=(f"{PYTORCH}/195163", f"{PYTORCH}/193487"),
        measure=measure_large_inner_size,
    ),
)

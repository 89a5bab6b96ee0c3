"""Attention: scores that overflow before they are scaled, real shapes, masks, long rows."""

import torch
import torch.nn.functional as F

from sdkit.diagnosis.probes.probe import HALF, Check, Probe, compare, compare_with, draw
from sdkit.emulate import suspended
from sdkit.emulate.faults.fault import DIFFUSERS, PYTORCH

# B batch, H heads, L queries, S keys, D width
# 40 * 64 * 64 = 163840 is beyond float16, and 163840 / sqrt(40) = 25905 is not: faults.md, P4.
WIDTH, EVERY_VALUE = 40, 64.0
SD15_LEVELS = ((4096, 40), (1024, 80), (256, 160), (64, 160))  # L, D at 512x512 pixels
TEXT_TOKENS = 77
COMFYUI = "https://github.com/Comfy-Org/ComfyUI/issues"


def control_overflows(query):
    """Checks that scores do overflow if they are rounded first: else nothing would be proved."""
    scores = (torch.bmm(query, query.mT) * WIDTH**-0.5).cpu()
    with suspended():
        return Check("control (bmm, then scale): finite", int(scores.isfinite().sum()))


def measure_scaled_product(device, thorough):
    length = 1024 if thorough else 8
    query = torch.full((2, length, WIDTH), EVERY_VALUE, dtype=HALF).to(device)
    zeros = torch.zeros(1, 1, 1, dtype=HALF).to(device)
    scores = torch.baddbmm(zeros, query, query.mT, beta=0, alpha=WIDTH**-0.5)
    with suspended():
        reference = torch.full(scores.shape, EVERY_VALUE**2 * WIDTH**0.5)
    return *compare_with("baddbmm", scores, reference), control_overflows(query)


def measure_scaled_attention(device, thorough):
    length = 1024 if thorough else 8
    with suspended():
        value = torch.linspace(-1, 1, length)[None, None, :, None].expand(1, 2, length, WIDTH)
        reference = value.double().mean(-2, keepdim=True).expand_as(value) + 1
        value = (value + 1).to(HALF).contiguous()
    query = torch.full((1, 2, length, WIDTH), EVERY_VALUE, dtype=HALF).to(device)
    output = F.scaled_dot_product_attention(query, query, value.to(device))
    return *compare_with("sdpa", output, reference), control_overflows(query[0])


def measure_shapes(device, thorough):
    levels, heads = (SD15_LEVELS, 8) if thorough else (((128, 40), (64, 80), (16, 160)), 2)
    checks = []
    for length, width in levels:
        for keys in (length, TEXT_TOKENS):
            inputs = [draw(2, heads, n, width, seed=n) for n in (length, keys, keys)]
            name = f"{length}x{keys}x{width}"
            checks += compare(name, F.scaled_dot_product_attention, *inputs, device=device)
    return checks


def attend_permuted(query, key, value):
    """Heads as views, as every model makes them: B, L, H, D turned to B, H, L, D."""
    views = (tensor.permute(0, 2, 1, 3) for tensor in (query, key, value))
    return F.scaled_dot_product_attention(*views)


def measure_permuted(device, thorough):
    levels, heads = (SD15_LEVELS, 8) if thorough else (((64, 40), (8, 64), (16, 160)), 2)
    checks = []
    for length, width in levels:
        for keys in (length, TEXT_TOKENS):
            inputs = [draw(2, n, heads, width, seed=n) for n in (length, keys, keys)]
            name = f"{length}x{keys}x{width}"
            checks += compare(name, attend_permuted, *inputs, device=device)
    return checks


def measure_masked_row(device, thorough):
    length = 77 if thorough else 8
    mask = torch.ones(length, length, dtype=torch.bool)
    mask[3] = False
    additive = torch.zeros(length, length, dtype=HALF).masked_fill(~mask, float("-inf"))
    inputs = [draw(2, 2, length, 64, seed=seed).to(HALF) for seed in range(3)]
    with suspended():
        query, key, value = (tensor.double() for tensor in inputs)
        scores = (query @ key.mT / 8).masked_fill(~mask, float("-inf"))
        reference = scores.softmax(-1).nan_to_num(0) @ value  # a row without keys answers zero
    on_device = [tensor.to(device) for tensor in inputs]
    checks = []
    for name, attn_mask in (("bool mask", mask), ("-inf mask", additive)):
        attn_mask = attn_mask.to(device)
        output = F.scaled_dot_product_attention(*on_device, attn_mask=attn_mask)
        checks += compare_with(name, output, reference)
    return checks


def measure_softmax(device, thorough):
    # 12416 keys, all 0.0598: pytorch#96602.
    rows = 2048 if thorough else 4
    constant = torch.full((1, 12416), 0.0598).expand(rows, -1)
    cases = {"constant": constant, "normal": draw(4, 12416), "peaked": draw(4, 12416, scale=1000)}
    checks = []
    for name, scores in cases.items():
        checks += compare(name, softmax, scores, device=device)
    return checks


def softmax(scores):
    return scores.softmax(-1)


PROBES = (
    Probe(
        name="scores-baddbmm",
        contract="baddbmm scales Q.K^T before it rounds it to float16.",
        guards=("attention slicing", "float16"),
        threads=(f"{PYTORCH}/119131", f"{PYTORCH}/160841"),
        measure=measure_scaled_product,
    ),
    Probe(
        name="scores-sdpa",
        contract="Attention scales Q.K^T before it rounds it to float16.",
        guards=("attention", "float16"),
        threads=(f"{PYTORCH}/119131", f"{PYTORCH}/160841"),
        measure=measure_scaled_attention,
    ),
    Probe(
        name="sdpa-shapes",
        contract="Attention is right at Stable Diffusion's shapes, 77 tokens too.",
        guards=("attention", "float16"),
        threads=(f"{PYTORCH}/169222", f"{PYTORCH}/174861", f"{COMFYUI}/3521"),
        measure=measure_shapes,
    ),
    Probe(
        name="sdpa-permuted",
        contract="Attention is right on heads that are views of one tensor.",
        guards=("attention", "float16"),
        threads=(f"{PYTORCH}/181133", f"{PYTORCH}/170837", f"{PYTORCH}/163597"),
        measure=measure_permuted,
    ),
    Probe(
        name="sdpa-masked-row",
        contract="A query that may attend to nothing answers zero and no NaN.",
        guards=("attention",),
        threads=(f"{PYTORCH}/156707", f"{PYTORCH}/103963"),
        measure=measure_masked_row,
    ),
    Probe(
        name="softmax-long-rows",
        contract="A softmax over 12416 float16 keys is right, and none of it NaN.",
        guards=("attention", "float16"),
        threads=(f"{PYTORCH}/96602", f"{PYTORCH}/190791", f"{DIFFUSERS}/2643"),
        measure=measure_softmax,
    ),
)

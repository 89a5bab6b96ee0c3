"""Norms, convolutions, linear layers and activations: range, and views of larger tensors."""

import torch
import torch.nn.functional as F

from sdkit.diagnosis.probes.probe import (
    BRAIN,
    HALF,
    Probe,
    compare,
    compare_with,
    count_different,
    draw,
)
from sdkit.emulate import suspended
from sdkit.emulate.faults.fault import DIFFUSERS, PYTORCH

# B batch, C channels, H W pixels, L tokens, D width
STD = 300.0  # its square, 90000, is beyond float16
GROUPS = 32


def normalize_groups(image):
    return F.group_norm(image, GROUPS)


def normalize_tokens(tokens):
    return F.layer_norm(tokens, tokens.shape[-1:])


def measure_group_norm(device, thorough):
    image = draw(2, 320, 64, 64, scale=STD) if thorough else draw(2, 64, 8, 8, scale=STD)
    return compare("std 300", normalize_groups, image, device=device)


def measure_layer_norm(device, thorough):
    tokens = draw(2, 4096, 320, scale=STD) if thorough else draw(2, 16, 64, scale=STD)
    return compare("std 300", normalize_tokens, tokens, device=device)


def measure_norms_of_slices(device, thorough):
    image = draw(4, 320, 64, 64) if thorough else draw(4, 64, 4, 4)
    tokens = draw(4, 4096, 320) if thorough else draw(4, 16, 64)
    return (
        *compare("group norm", lambda x: normalize_groups(x[2:]), image, device=device),
        *compare("layer norm", lambda x: normalize_tokens(x[2:]), tokens, device=device),
    )


def measure_norms_of_transposed(device, thorough):
    image = draw(2, 64, 64, 320) if thorough else draw(2, 4, 4, 64)  # B, H, W, C
    tokens = draw(2, 320, 4096) if thorough else draw(2, 64, 16)  # B, D, L
    return (
        *compare(
            "group norm", lambda x: normalize_groups(x.permute(0, 3, 1, 2)), image, device=device
        ),
        *compare("layer norm", lambda x: normalize_tokens(x.mT), tokens, device=device),
    )


def draw_convolution(thorough):
    """An image of twice the channels that a 3x3 kernel takes, and the kernel."""
    channels, pixels = (320, 64) if thorough else (16, 8)
    image = draw(2, 2 * channels, pixels, pixels, seed=1)
    return image, draw(channels, channels, 3, 3, seed=2, scale=(9 * channels) ** -0.5)


def measure_convolution_of_chunk(device, thorough):
    def convolve(image, kernel):
        return F.conv2d(image.chunk(2, dim=1)[1], kernel, padding=1)

    return compare("second half of the channels", convolve, *draw_convolution(thorough),
                   device=device)  # fmt: skip


def measure_channels_last(device, thorough):
    def convolve_dense(image, kernel):
        image = image[:, : kernel.shape[1]].to(memory_format=torch.channels_last)
        return F.conv2d(image, kernel.to(memory_format=torch.channels_last), padding=1)

    def convolve_slice(image, kernel):
        image = image.to(memory_format=torch.channels_last)
        return F.conv2d(image[:, kernel.shape[1] :], kernel, padding=1)

    image, kernel = draw_convolution(thorough)
    return (
        *compare("dense", convolve_dense, image, kernel, device=device),
        *compare("slice of channels", convolve_slice, image, kernel, device=device),
    )


def measure_strided_weight(device, thorough):
    rows, width = (4096, 320) if thorough else (16, 64)
    tokens, bias = draw(rows, width, seed=1), draw(width, seed=2)
    matrix = draw(2 * width, 2 * width, seed=3, scale=width**-0.5)

    def multiply_by_slice(x, w, b):
        return F.linear(x, w[::2, :width], b)

    def multiply_by_transposed(x, w, b):
        return F.linear(x, w[:width, :width].t(), b)

    return (
        *compare("slice", multiply_by_slice, tokens, matrix, bias, device=device),
        *compare("transposed", multiply_by_transposed, tokens, matrix, bias, device=device),
    )


def measure_repeated_linear(device, thorough):
    length, width = (4096, 320) if thorough else (16, 64)
    tokens = draw(2, length, width, seed=1).to(HALF).to(device)
    weight = draw(width, width, seed=2, scale=width**-0.5).to(HALF).to(device)
    outputs = [F.linear(tokens, weight).cpu() for _ in range(4)]
    with suspended():
        reference = tokens.cpu().double() @ weight.cpu().double().T
    flat = F.linear(tokens.flatten(0, 1), weight).view(tokens.shape)
    return (
        *(count_different("again", output, outputs[0]) for output in outputs[1:]),
        *compare_with("3-D", outputs[0], reference),
        *compare_with("flattened", flat, reference),
    )


def measure_activations(device, thorough):
    values = torch.linspace(-100, 100, 100_000 if thorough else 4001)
    checks = []
    for dtype in (HALF, BRAIN):
        for activation in (F.gelu, F.silu):
            name = f"{activation.__name__} {str(dtype).removeprefix('torch.')}"
            checks += compare(name, activation, values, device=device, dtype=dtype, allowed=1e-2)
    return checks


PROBES = (
    Probe(
        name="group-norm-range",
        contract="Group norm of float16 keeps statistics beyond float16's range.",
        guards=("float16",),
        threads=(f"{PYTORCH}/96113", f"{DIFFUSERS}/2521"),
        measure=measure_group_norm,
    ),
    Probe(
        name="layer-norm-range",
        contract="Layer norm of float16 keeps statistics beyond float16's range.",
        guards=("float16",),
        threads=(f"{PYTORCH}/96113", f"{DIFFUSERS}/4480"),
        measure=measure_layer_norm,
    ),
    Probe(
        name="norm-slices",
        contract="A norm of a slice reads the slice, not the start of its storage.",
        guards=("sampling", "training"),
        threads=(f"{PYTORCH}/131750", f"{PYTORCH}/133520"),
        measure=measure_norms_of_slices,
    ),
    Probe(
        name="norm-transposed",
        contract="A norm of a transposed tensor heeds its strides.",
        guards=("sampling", "training"),
        threads=(f"{PYTORCH}/175189", f"{PYTORCH}/133520"),
        measure=measure_norms_of_transposed,
    ),
    Probe(
        name="conv-chunk",
        contract="A convolution of a chunk is right for every image of a batch.",
        guards=("sampling",),
        threads=(f"{PYTORCH}/169342",),
        measure=measure_convolution_of_chunk,
    ),
    Probe(
        name="conv-channels-last",
        contract="A convolution is right in channels_last, and on slices of it.",
        guards=("sampling", "training"),
        threads=(f"{PYTORCH}/180984", f"{PYTORCH}/192212"),
        measure=measure_channels_last,
    ),
    Probe(
        name="linear-strided-weight",
        contract="A linear layer heeds the strides of its weight.",
        guards=("loading", "training"),
        threads=(f"{PYTORCH}/162730", f"{PYTORCH}/161640"),
        measure=measure_strided_weight,
    ),
    Probe(
        name="linear-repeats",
        contract="A linear layer gives the same bits every time.",
        guards=("sampling", "training"),
        threads=(f"{PYTORCH}/180776", f"{PYTORCH}/181466"),
        measure=measure_repeated_linear,
    ),
    Probe(
        name="activations",
        contract="gelu and silu are right between -100 and 100, in bfloat16 too.",
        guards=("float16", "sampling"),
        threads=(f"{PYTORCH}/186278", f"{PYTORCH}/98212"),
        measure=measure_activations,
    ),
)

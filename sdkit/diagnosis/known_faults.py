"""Faults that are publicly known, with the versions they are known of: which apply here?

What a version table says is a hint; the probes decide. Sources: the threads of each.
"""

import re
from dataclasses import dataclass

from sdkit.emulate.faults.fault import DIFFUSERS, PYTORCH

COMFYUI = "https://github.com/Comfy-Org/ComfyUI/issues"


@dataclass(frozen=True)
class KnownFault:
    """A fault, and where it is known.

    Attributes:
        summary: What goes wrong, in one sentence.
        device_type: "mps" or "cuda".
        threads: Where that is documented.
        since: The first torch release that has it, as far as sdkit runs on (2.7 and newer).
        fixed_in: The first torch release without it, or None if none is known.
        macos_since: The first macOS that has it, or None.
        macos_before: The first macOS without it, or None.
        device_name: Part of the card's name, or "".
        probes: Names of the probes that show it.
    """

    summary: str
    device_type: str
    threads: tuple[str, ...]
    since: str = "2.7"
    fixed_in: str | None = None
    macos_since: str | None = None
    macos_before: str | None = None
    device_name: str = ""
    probes: tuple[str, ...] = ()


KNOWN_FAULTS = (
    KnownFault(
        "baddbmm with beta=0 reads its input: attention slicing lets stale memory blacken images.",
        "mps",
        (f"{PYTORCH}/187521", f"{DIFFUSERS}/11229"),
        fixed_in="2.14",
        probes=("baddbmm-beta-zero", "recycled-memory"),
    ),
    KnownFault(
        "Matrix products over 32767 terms and more read past their operands on M1 and M2.",
        "mps",
        (f"{PYTORCH}/195163",),
        fixed_in="2.14",
        probes=("matmul-large-inner-size",),
    ),
    KnownFault(
        "GradScaler sets float16 gradients to zero: the loss stays flat.",
        "mps",
        (f"{PYTORCH}/184286",),
        since="2.8",
        fixed_in="2.14",
        probes=("unscale-gradients",),
    ),
    KnownFault(
        "GradScaler raises a TypeError, for it needs float64.",
        "mps",
        (f"{PYTORCH}/142397",),
        fixed_in="2.8",
        probes=("unscale-gradients",),
    ),
    KnownFault(
        'non_blocking copies may read memory that is gone: device_map="mps" loads such weights.',
        "mps",
        (f"{PYTORCH}/189690", f"{DIFFUSERS}/13227"),
        fixed_in="2.13",
        probes=("host-copies",),
    ),
    KnownFault(
        "Attention answers NaN where a query may attend to nothing.",
        "mps",
        (f"{PYTORCH}/156707", "https://github.com/huggingface/transformers/issues/40858"),
        fixed_in="2.8",
        probes=("sdpa-masked-row",),
    ),
    KnownFault(
        "Attention over few queries is wrong on heads that are views.",
        "mps",
        (f"{PYTORCH}/163597",),
        since="2.8",
        fixed_in="2.9",
        probes=("sdpa-permuted",),
    ),
    KnownFault(
        "A linear layer ignores the strides of its weight.",
        "mps",
        (f"{PYTORCH}/162730",),
        since="2.8",
        fixed_in="2.9",
        probes=("linear-strided-weight",),
    ),
    KnownFault(
        "A convolution of a chunk is right for the first image alone (one report, on an M5).",
        "mps",
        (f"{PYTORCH}/169342",),
        since="2.9",
        macos_since="26.2",
        probes=("conv-chunk",),
    ),
    KnownFault(
        "Images turn black part-way in float16; how much of it is the fault of baddbmm is open.",
        "mps",
        (f"{COMFYUI}/3521", f"{COMFYUI}/15804"),
        macos_since="14.5",
    ),
    KnownFault(
        "Uniform float16 numbers reach 1.",
        "mps",
        (f"{PYTORCH}/197079",),
        probes=("rand-below-one",),
    ),
    KnownFault(
        "There is no bfloat16 before macOS 14.",
        "mps",
        (f"{PYTORCH}/99272",),
        macos_before="14",
    ),
    KnownFault(
        "Cards of the GTX 16 series give NaN in float16.",
        "cuda",
        (f"{PYTORCH}/58123",),
        device_name="GTX 16",
    ),
)


def find_known_faults(device_type, torch_version, *, macos=None, device_name=""):
    """Finds the known faults of a configuration, from plain values.

    Args:
        device_type: "mps", "cuda" or "cpu".
        torch_version: Such as "2.13.0+cpu".
        macos: Such as "14.5"; None leaves out what depends on it.
        device_name: The card's name on CUDA.

    Returns:
        A tuple of KnownFaults.
    """
    return tuple(
        fault
        for fault in KNOWN_FAULTS
        if fault.device_type == device_type
        and fault.device_name in device_name
        and is_within(torch_version, fault.since, fault.fixed_in)
        and (not (fault.macos_since or fault.macos_before) or macos)
        and is_within(macos or "0", fault.macos_since, fault.macos_before)
    )


def is_within(version, since, before):
    """Whether a version is at least `since` and below `before`; None is no limit."""
    version = read_version(version)
    return (since is None or version >= read_version(since)) and (
        before is None or version < read_version(before)
    )


def read_version(version):
    """Returns (2, 13) for "2.13.0+cpu": major and minor, which is what faults come and go with."""
    return tuple(int(part) for part in re.findall(r"\d+", f"{version}.0")[:2])

"""What a probe is, what it measures, and what comes of it."""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from sdkit.emulate import suspended

HALF, BRAIN, SINGLE = torch.float16, torch.bfloat16, torch.float32
# Of float16 results against float64, relative to the largest: one rounding is 5e-4, and a few
# meet where a kernel keeps intermediate values in float16. faults.md, probe P3.
HALF_TOLERANCE = 5e-3


@dataclass(frozen=True)
class Check:
    """One measured number and the largest that keeps the contract.

    Attributes:
        name: What was measured.
        value: The number.
        allowed: What it may be at most.
    """

    name: str
    value: float
    allowed: float = 0

    @property
    def is_kept(self):
        """Whether the number is within what is allowed; NaN never is."""
        return self.value <= self.allowed


@dataclass(frozen=True)
class Probe:
    """One contract that Stable Diffusion relies on, and how to try it on a device.

    Attributes:
        name: What it is asked for by.
        contract: What must hold, in one sentence.
        guards: What breaks if it does not: "float16", "attention slicing", "attention", "loading",
            "sampling", "training", "checks".
        threads: Public threads of backends that broke it.
        measure: `measure(device, thorough)`, which returns the Checks; thorough means the sizes
            of Stable Diffusion 1.5.
    """

    name: str
    contract: str
    guards: tuple[str, ...]
    threads: tuple[str, ...]
    measure: Callable


@dataclass(frozen=True)
class ProbeResult:
    """What came of one probe.

    Attributes:
        name: The probe's.
        status: "pass", "fail" or "not-runnable".
        message: What broke the contract, or why it could not be tried; empty on a pass.
        evidence: {what was measured: the number}.
        allowed: {what was measured: the largest number that keeps the contract}.
        seconds: How long it took, or None under an emulation, where that means nothing.
    """

    name: str
    status: str
    message: str = ""
    evidence: dict = field(default_factory=dict)
    allowed: dict = field(default_factory=dict)
    seconds: float | None = None


def draw(*shape, seed=0, scale=1.0):
    """Draws normal numbers on the CPU in float32, whatever the device or an emulation do."""
    with suspended():
        generator = torch.Generator("cpu").manual_seed(seed)
        return torch.randn(shape, generator=generator) * scale


def compare(name, function, *inputs, device, dtype=HALF, allowed=HALF_TOLERANCE):
    """Compares a function on the device with float64 on the CPU.

    Args:
        name: What is computed, for the checks.
        function: Takes the inputs; makes views by itself, for a copy to a device undoes them.
        *inputs: float32 tensors, rounded to the dtype for both.
        device: Where to compute.
        dtype: The dtype to compute in.
        allowed: The largest error, relative to the largest value of the reference.

    Returns:
        Two checks: values that are NaN or Inf, and the error of the others.
    """
    with suspended():
        rounded = [tensor.to(dtype) for tensor in inputs]
        reference = function(*(tensor.double() for tensor in rounded))
    result = function(*(tensor.to(device) for tensor in rounded))
    return compare_with(name, result, reference, allowed=allowed)


def compare_with(name, result, reference, *, allowed=HALF_TOLERANCE):
    """Compares a result with a reference, on the CPU: a device's own checks may lie.

    Returns:
        Two checks: values that are NaN or Inf, and the error of the others.
    """
    result = result.detach().cpu()
    with suspended():
        result, reference = result.double(), reference.double()
        is_finite = result.isfinite()
        errors = (result - reference).abs()[is_finite]
        error = errors.max() / reference.abs().max() if is_finite.any() else torch.tensor(0.0)
        nonfinite_count = int((~is_finite).sum())
    return (
        Check(f"{name}: NaN or Inf", nonfinite_count),
        Check(f"{name}: error", float(error), allowed),
    )


def count_different(name, result, expected):
    """Checks that not a bit of a result differs from what it must be.

    Returns:
        One check: the number of different values.
    """
    result, expected = result.detach().cpu(), expected.detach().cpu()
    with suspended():
        is_same = result.eq(expected) | (result.isnan() & expected.isnan())
        return Check(f"{name}: different values", int((~is_same).sum()))

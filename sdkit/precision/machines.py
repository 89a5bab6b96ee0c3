"""Machines, and whether something fits on them."""

from dataclasses import dataclass

import psutil
import torch

from sdkit.device import GIB, choose_device, measure_available_gib
from sdkit.validation import ValidationError

# Of unified memory: what Metal recommends that one process uses at most
# (recommendedMaxWorkingSetSize as llama.cpp prints it: 5461 MiB of 8 GB, 10923 of 16, 21845 of 32).
METAL_SHARE = 2 / 3


@dataclass(frozen=True)
class Machine:
    """A machine, and the memory that a model can have on it.

    Attributes:
        name: For people.
        memory_gib: All of it.
        least_gib: Free in any case.
        most_gib: Free with little else open.
        source: Where these come from.
    """

    name: str
    memory_gib: float
    least_gib: float
    most_gib: float
    source: str


def _mac(memory_gib):
    # macOS itself keeps about 3 GB, which binds on the smallest Mac only.
    most = min(memory_gib * METAL_SHARE, memory_gib - 3)
    return Machine(
        f"Mac, {memory_gib} GB", memory_gib, 0.75 * most, most,
        "the less of Metal's recommended two thirds and all but 3 GB for macOS; least: a quarter "
        "of that in use by other programs",
    )  # fmt: skip


MACHINES = {
    machine.name: machine
    for machine in (
        Machine("M2 Max, 32 GB", 32, 10, 12, "the report's: 10-12 GB free"),
        _mac(8),
        _mac(16),
    )
}


@dataclass(frozen=True)
class Verdict:
    """Whether something fits on a machine.

    Attributes:
        machine: The machine's name.
        answer: "fits", "tight" (only with little else open) or "does not fit".
        needed_gib: What it needs.
        least_gib: What is free in any case.
        most_gib: What is free with little else open.
    """

    machine: str
    answer: str
    needed_gib: float
    least_gib: float
    most_gib: float

    def __bool__(self):
        """Whether it fits, tightly or not."""
        return self.answer != "does not fit"

    def __str__(self):
        """One line."""
        free = f"{self.least_gib:.1f}"
        if self.most_gib != self.least_gib:
            free += f" to {self.most_gib:.1f}"
        return f"{self.machine}: {self.answer} ({self.needed_gib:.1f} GiB needed, {free} GiB free)"


def judge(needed_gib, machine="here"):
    """Returns a Verdict.

    Args:
        needed_gib: What is needed.
        machine: A name in `MACHINES`, a `Machine`, or "here".

    Raises:
        ValidationError: An unknown machine.
    """
    if machine == "here":
        machine = describe_here()
    elif not isinstance(machine, Machine):
        if machine not in MACHINES:
            raise ValidationError(
                f"machine={machine!r}: expected here, a Machine, or one of {'; '.join(MACHINES)}."
            )
        machine = MACHINES[machine]
    answer = "fits" if needed_gib <= machine.least_gib else "tight"
    if needed_gib > machine.most_gib:
        answer = "does not fit"
    return Verdict(machine.name, answer, needed_gib, machine.least_gib, machine.most_gib)


def describe_here():
    """Returns this machine, with what is free on its device now."""
    device, _ = choose_device()
    available_gib = measure_available_gib(device)
    total = psutil.virtual_memory().total
    if device.type == "cuda":
        total = torch.cuda.get_device_properties(device).total_memory
    return Machine(
        f"this machine ({device})", total / GIB, available_gib, available_gib, "measured now"
    )

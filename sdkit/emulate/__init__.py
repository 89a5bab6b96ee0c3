"""float16 and Apple's MPS backend emulated on any CPU: numbers and faults, not speed or memory."""

from sdkit.emulate.backend import mps
from sdkit.emulate.faults import FAULTS, Fault
from sdkit.emulate.float16 import float16_arithmetic
from sdkit.emulate.mode import EmulationWarning, active, suspended

__all__ = [
    "FAULTS",
    "EmulationWarning",
    "Fault",
    "active",
    "float16_arithmetic",
    "mps",
    "suspended",
]

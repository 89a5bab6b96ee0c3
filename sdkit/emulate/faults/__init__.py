"""Documented faults of the MPS backend, as data: which ops they rewrite, and what they do instead.

A fault wraps the honest op. Adding one means one function `apply(func, args, kwargs, compute)` and
one `Fault` in the file of its theme: return `compute(func, args, kwargs)` where it does not
strike. `compute` runs any aten op as the emulated backend does, with the faults listed after it.
"""

from sdkit.emulate.faults import attention, products, training, values, views
from sdkit.emulate.faults.fault import Fault

__all__ = ["FAULTS", "Fault"]

FAULTS = {
    fault.name: fault
    for theme in (products, attention, views, values, training)
    for fault in theme.FAULTS
}

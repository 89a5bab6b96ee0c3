"""Gradients that a training step loses."""

from sdkit.emulate.faults.fault import PYTORCH, Fault
from sdkit.emulate.float16 import HALVES


def zero_half_gradients(func, args, kwargs, compute):
    """Unscale gradients of half precision to zero."""
    result = compute(func, args, kwargs)
    for gradient in args[0]:
        if gradient.dtype in HALVES:
            gradient.zero_()
    return result


FAULTS = (
    Fault(
        name="unscale-zeroes",
        ops=("aten._amp_foreach_non_finite_check_and_unscale_",),
        threads=(f"{PYTORCH}/184286",),
        affects="MPS from torch 2.8 through 2.13, float16 and bfloat16: the loss stays flat.",
        apply=zero_half_gradients,
    ),
)

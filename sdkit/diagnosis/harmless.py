"""Which NaN and Inf may be meant: a mask of -inf, a number that was written as one."""

import math


def has_nan_in(tensor) -> bool:
    """Whether a tensor holds NaN."""
    return tensor.is_floating_point() and bool(tensor.detach().float().isnan().any())


def rises(tensor) -> bool:
    """Whether a tensor holds +inf: -inf alone may be a mask that came from outside."""
    return bool((tensor.detach().float() == float("inf")).any())


def is_mask(named, outputs) -> bool:
    """Whether -inf alone was written as a constant, as by `masked_fill(-inf)` or `full(-inf)`."""
    numbers = [value for value in named.values() if isinstance(value, float)]
    return float("-inf") in numbers and not any(map(rises, outputs))


def is_constant(named) -> bool:
    """Whether a NaN was written as a number: a suspect, for nobody may ever read it."""
    return any(isinstance(value, float) and math.isnan(value) for value in named.values())

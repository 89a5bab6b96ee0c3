"""What a fault is: one public defect of a backend, as data."""

from collections.abc import Callable
from dataclasses import dataclass

PYTORCH = "https://github.com/pytorch/pytorch/issues"  # GitHub leads on to a pull request's page
DIFFUSERS = "https://github.com/huggingface/diffusers/issues"


@dataclass(frozen=True)
class Fault:
    """One public defect of a backend, planted at the level of aten ops.

    Attributes:
        name: How it is switched on: `mps(faults=(name,))`.
        ops: The ops it rewrites, as overloads (`aten.baddbmm.out`) or all overloads of one
            (`aten.baddbmm`); in-place ops are named with their underscore.
        threads: Public threads that document it.
        affects: Versions and dtypes in which it was seen or read, and what is only inferred.
        apply: `apply(func, args, kwargs, compute)`, which returns what the op would return.
    """

    name: str
    ops: tuple[str, ...]
    threads: tuple[str, ...]
    affects: str
    apply: Callable

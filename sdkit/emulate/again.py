"""Enters an emulation again from what a record says of it."""

import warnings
from contextlib import ExitStack, contextmanager, nullcontext

from sdkit.emulate.backend import mps
from sdkit.emulate.faults import FAULTS
from sdkit.emulate.float16 import float16_arithmetic
from sdkit.emulate.mode import EmulationWarning


@contextmanager
def emulate_again(settings: dict | None):
    """Runs the body under the emulation that `find_settings` described.

    Args:
        settings: What it returned; None for no emulation.

    Raises:
        ValueError: A fault that is not among the documented ones.
    """
    if settings is None:
        emulation = nullcontext()
    elif settings:
        unknown = [name for name in settings["faults"] if name not in FAULTS]
        if unknown:
            raise ValueError(f"fault {unknown[0]!r} is not among {', '.join(FAULTS)}")
        emulation = mps(settings["memory"], tuple(settings["faults"]), seed=settings["seed"])
    else:
        emulation = float16_arithmetic()
    with ExitStack() as stack:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", EmulationWarning)  # the record says that it was one
            stack.enter_context(emulation)
        yield

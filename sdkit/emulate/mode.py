"""The one dispatch mode of every emulation, and the answer to "is this run emulated?"."""

from contextlib import contextmanager
from functools import cache

import torch
from torch.utils._python_dispatch import (
    TorchDispatchMode,
    _disable_current_modes,
    _get_current_dispatch_mode_stack,
)


class EmulationWarning(UserWarning):
    """Said on entry of an emulated backend: its seconds and memory mean nothing."""


class Emulation(TorchDispatchMode):
    """Runs every aten op of the thread as `choose(func)` says, and undoes itself.

    What was chosen for an op, a function of `(args, kwargs)`, holds for all its calls: a small
    model is thousands of small ops, and what is asked anew for each takes longer than they do.
    """

    def __init__(self, choose, description, settings):
        super().__init__()
        self.choose = cache(choose)
        self.description = description
        self.settings = settings
        self.shadows = 0  # emulations entered inside this one: the innermost alone acts

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if self.shadows:
            return func(*args, **kwargs)
        if is_composite(func):
            # Only inference_mode brings composite ops here whole. Taken apart, they meet the same
            # rules and faults as under no_grad.
            with self:
                return func.decompose(*args, **kwargs)
        return self.choose(func)(args, kwargs)


@cache
def is_composite(func) -> bool:
    """Whether torch itself defines this overload by other aten ops only."""
    return torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), "CompositeImplicitAutograd")


@contextmanager
def emulating(choose, description, settings):
    """Run the body as `choose` says; the emulations around it rest until it ends."""
    outer = find_emulations()
    for emulation in outer:
        emulation.shadows += 1
    try:
        with Emulation(choose, description, settings) as emulation:
            yield emulation
    finally:
        for emulation in outer:
            emulation.shadows -= 1


def find_emulations() -> list[Emulation]:
    """The emulations of this thread, outermost first."""
    return [mode for mode in _get_current_dispatch_mode_stack() if isinstance(mode, Emulation)]


def active() -> str | None:
    """Say which emulation acts on this thread now.

    Returns:
        A short description such as `"emulated MPS (memory=zeros, faults=baddbmm-beta-zero)"`, or
        `None` outside every emulation. Whoever measures seconds or memory must leave them out
        when this is not `None`.
    """
    emulations = find_emulations()
    return emulations[-1].description if emulations else None


def find_settings() -> dict | None:
    """With which arguments the acting emulation was entered, as JSON types; None outside of all."""
    emulations = find_emulations()
    return emulations[-1].settings if emulations else None


@contextmanager
def suspended():
    """Run the body outside every emulation and every other mode: a judge must not be emulated."""
    with _disable_current_modes(), torch._C.DisableTorchFunction():
        yield

"""float16's rounding without float16's range: what a healthy float16 would cost a faulty model."""

import math
from contextlib import ExitStack, contextmanager

import torch
from diffusers.models.embeddings import GaussianFourierProjection, Timesteps
from torch.utils._python_dispatch import TorchDispatchMode

from sdkit.emulate.memory import is_allocating
from sdkit.emulate.mode import suspended
from sdkit.emulate.schema import is_view
from sdkit.loading.lifting import restored

# Bits of a float32 significand that a narrower one lacks: 24 - 11 and 24 - 8.
DROPPED_BITS = {torch.float16: 13, torch.bfloat16: 16}
# Two grids of the same fineness that share few values: two draws of the same lot. One image alone
# is 3 dB better or worse by chance (standard deviation over nine draws of the bundled model).
GRIDS = (1.0, 2.0**0.5)
MORE_GRIDS = (2.0**0.25, 2.0**0.75)  # where it is a near thing


@contextmanager
def rounded_significands(models, dtype, grid=1.0):
    """Runs float32 models with the significand of another dtype, and float32's exponent.

    Timesteps are embedded in float32 whatever the dtype of a model, and here too.

    Args:
        models: Modules in float32; their weights are rounded while the body runs.
        dtype: torch.float16 or torch.bfloat16.
        grid: Numbers are rounded to this times what the dtype can hold: 1.0 are its own.
    """
    dropped = DROPPED_BITS[dtype]
    mode = RoundedSignificands(dropped, grid)
    with ExitStack() as undo:
        models = list(models)
        undo.enter_context(restored([w for model in models for w in model.parameters()]))
        for model in models:
            for weight in model.parameters():
                weight.data = round_significand(weight.data, dropped, grid)
            for module in model.modules():
                if isinstance(module, (Timesteps, GaussianFourierProjection)):
                    undo.callback(module.register_forward_pre_hook(mode.rest).remove)
                    undo.callback(module.register_forward_hook(mode.wake).remove)
        undo.enter_context(mode)
        yield


class RoundedSignificands(TorchDispatchMode):
    """Rounds every float32 result by so many bits, unless it rests."""

    def __init__(self, dropped, grid):
        super().__init__()
        self.dropped = dropped
        self.grid = grid
        self.is_resting = False

    def rest(self, *_):
        """Before a module that computes in float32 in any dtype."""
        self.is_resting = True

    def wake(self, *_):
        """After it."""
        self.is_resting = False

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if self.is_resting or is_view(func) or is_allocating(func):
            return result
        with suspended():
            return round_all(result, self.dropped, self.grid)


def round_all(value, dropped, grid):
    """Rounds the float32 tensors in what an op returned, in place."""
    if isinstance(value, torch.Tensor):
        if value.dtype is torch.float32:
            value.detach().copy_(round_significand(value.detach(), dropped, grid))
    elif isinstance(value, (list, tuple)):
        for item in value:
            round_all(item, dropped, grid)
    return value


def round_significand(values: torch.Tensor, dropped: int, grid=1.0) -> torch.Tensor:
    """Rounds to nearest even at a bit of the significand; NaN and Inf stay what they are.

    Args:
        values: float32.
        dropped: Bits to drop, 13 for float16's precision.
        grid: What the rounded values are multiples of.
    """
    if grid != 1.0:
        return round_significand(values / grid, dropped) * grid
    bits = values.contiguous().view(torch.int32)
    half = (1 << (dropped - 1)) - 1
    rounded = (bits >> dropped).bitwise_and_(1).add_(bits).add_(half).bitwise_and_(-1 << dropped)
    rounded = rounded.view(torch.float32)
    if math.isfinite(values.sum()):  # one pass; finite numbers may have the sum Inf: look closer
        return rounded
    return torch.where(values.isfinite(), rounded, values)

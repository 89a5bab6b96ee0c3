"""float16's rounding without float16's range: what a healthy float16 would cost a faulty model."""

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


@contextmanager
def rounded_significands(models, dtype):
    """Runs float32 models with the significand of another dtype, and float32's exponent.

    Timesteps are embedded in float32 whatever the dtype of a model, and here too.

    Args:
        models: Modules in float32; their weights are rounded while the body runs.
        dtype: torch.float16 or torch.bfloat16.
    """
    dropped = DROPPED_BITS[dtype]
    mode = RoundedSignificands(dropped)
    with ExitStack() as undo:
        models = list(models)
        undo.enter_context(restored([w for model in models for w in model.parameters()]))
        for model in models:
            for weight in model.parameters():
                weight.data = round_significand(weight.data, dropped)
            for module in model.modules():
                if isinstance(module, (Timesteps, GaussianFourierProjection)):
                    undo.callback(module.register_forward_pre_hook(mode.rest).remove)
                    undo.callback(module.register_forward_hook(mode.wake).remove)
        undo.enter_context(mode)
        yield


class RoundedSignificands(TorchDispatchMode):
    """Rounds every float32 result by so many bits, unless it rests."""

    def __init__(self, dropped):
        super().__init__()
        self.dropped = dropped
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
            return round_all(result, self.dropped)


def round_all(value, dropped):
    """Rounds the float32 tensors in what an op returned, in place."""
    if isinstance(value, torch.Tensor):
        if value.dtype is torch.float32:
            value.detach().copy_(round_significand(value.detach(), dropped))
    elif isinstance(value, (list, tuple)):
        for item in value:
            round_all(item, dropped)
    return value


def round_significand(values: torch.Tensor, dropped: int) -> torch.Tensor:
    """Rounds to nearest even at a bit of the significand; NaN and Inf stay what they are.

    Args:
        values: float32.
        dropped: Bits to drop, 13 for float16's precision.
    """
    bits = values.contiguous().view(torch.int32)
    half = (1 << (dropped - 1)) - 1
    rounded = bits + half + ((bits >> dropped) & 1)
    rounded = (rounded >> dropped) << dropped
    return torch.where(values.isfinite(), rounded.view(torch.float32), values)

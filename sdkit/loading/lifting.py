"""Lifts a pipeline, a component or a module to float32 for the length of a block.

Afterwards they hold the very tensors that they had: a lift leaves no rounding behind.
"""

from contextlib import ExitStack, contextmanager, nullcontext

import torch

from sdkit.emulate.float16 import HALVES
from sdkit.emulate.mode import suspended
from sdkit.loading.border_casts import bordered, map_floats
from sdkit.loading.modules import find_models


@contextmanager
def in_float32(pipe, names=None):
    """Runs the body with components in float32; afterwards they hold the very tensors they had.

    Args:
        pipe: A diffusers pipeline.
        names: Components to lift; by default all that hold float16 or bfloat16.
    """
    modules = [m for name, m in find_models(pipe).items() if names is None or name in names]
    tensors = [t for m in modules for t in list_tensors(m) if t.dtype in HALVES]
    with restored(tensors):
        for tensor in tensors:
            tensor.data = tensor.data.float()
        with bordered(pipe):
            yield


@contextmanager
def restored(tensors):
    """Gives parameters and buffers their very data back when the body ends, however it ends."""
    kept = [(tensor, tensor.data) for tensor in tensors]
    try:
        yield
    finally:
        for tensor, data in kept:
            tensor.data = data


def list_tensors(model) -> list[torch.Tensor]:
    """The floating parameters and buffers of a model."""
    tensors = (*model.parameters(), *model.buffers())
    return [tensor for tensor in tensors if tensor.is_floating_point()]


def holds_low(model) -> bool:
    """Whether a model holds float16 or bfloat16, so that float32 is another try."""
    return any(parameter.dtype in HALVES for parameter in model.parameters())


@contextmanager
def computing(modules, *, on_cpu=False):
    """Lets modules compute in float32 (on the CPU); what goes in and comes out keeps its kind."""
    with ExitStack() as undo:
        for module in modules:
            undo.enter_context(computing_one(module, on_cpu))
        yield


@contextmanager
def computing_one(module, on_cpu):
    own, forward = vars(module).get("forward"), module.forward
    tensors = list_tensors(module)

    def compute(*args, **kwargs):
        came = []  # (dtype, device) of the floats that came in

        def take(tensor):
            came.append((tensor.dtype, tensor.device))
            return tensor.to("cpu" if on_cpu else tensor.device, torch.float32)

        def give(tensor):
            dtype, device = came[0] if came else (tensor.dtype, tensor.device)
            return tensor.to(device, dtype)

        with suspended() if on_cpu else nullcontext():
            args, kwargs = map_floats(args, take), map_floats(kwargs, take)
            return map_floats(forward(*args, **kwargs), give)

    with restored(tensors):
        for tensor in tensors:
            tensor.data = tensor.data.to("cpu" if on_cpu else tensor.device, torch.float32)
        module.forward = compute
        try:
            yield
        finally:
            del module.forward
            if own is not None:
                module.forward = own

"""Lifts a pipeline, a component or a module to float32 for the length of a block.

Afterwards they hold the very tensors that they had: a lift leaves no rounding behind.
"""

from contextlib import ExitStack, contextmanager, nullcontext

import torch

from sdkit.emulate.mode import suspended
from sdkit.loading.border_casts import MARK, install_border_casts, map_floats, remove_border_casts

LOW_DTYPES = (torch.float16, torch.bfloat16)


@contextmanager
def in_float32(pipe, names=None):
    """Runs the body with components in float32; afterwards they hold the very tensors they had.

    Args:
        pipe: A diffusers pipeline.
        names: Components to lift; by default all that hold float16 or bfloat16.
    """
    modules = [
        module
        for name, module in pipe.components.items()
        if isinstance(module, torch.nn.Module) and (names is None or name in names)
    ]
    tensors = [t for module in modules for t in (*module.parameters(), *module.buffers())]
    kept = {tensor: tensor.data for tensor in tensors if tensor.dtype in LOW_DTYPES}
    had_casts = any(hasattr(c, MARK) for c in pipe.components.values())
    try:
        for tensor, data in kept.items():
            tensor.data = data.float()
        if not had_casts:
            install_border_casts(pipe)
        yield
    finally:
        if not had_casts:
            remove_border_casts(pipe)
        for tensor, data in kept.items():
            tensor.data = data


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
    tensors = [t for t in (*module.parameters(), *module.buffers()) if t.is_floating_point()]
    kept = {tensor: tensor.data for tensor in tensors}

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

    try:
        for tensor, data in kept.items():
            tensor.data = data.to("cpu" if on_cpu else data.device, torch.float32)
        module.forward = compute
        yield
    finally:
        for tensor, data in kept.items():
            tensor.data = data
        vars(module).pop("forward", None)
        if own is not None:
            module.forward = own

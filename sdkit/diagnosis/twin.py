"""The same pipeline in float32, for the length of a block: what would it have drawn?"""

from contextlib import contextmanager

import torch

from sdkit.diagnosis.experiments import LOW_DTYPES
from sdkit.loading.border_casts import MARK, install_border_casts, remove_border_casts


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

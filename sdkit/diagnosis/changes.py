"""What a remedy changes while it is tried; each change undoes itself, to the very tensors."""

from contextlib import contextmanager

import torch
from diffusers.models.attention_processor import AttnProcessor2_0
from torch.utils._python_dispatch import TorchDispatchMode

from sdkit.diagnosis.experiments import SOFTMAX_OPS
from sdkit.emulate.memory import is_allocating
from sdkit.emulate.mode import is_composite, suspended
from sdkit.finding import find_tensors
from sdkit.loading.lifting import restored
from sdkit.loading.modules import find_module


@contextmanager
def mended(module):
    """A module whose output has zeros where it had NaN or Inf."""

    def mend(module, args, output):
        for tensor in find_tensors(output):
            tensor.copy_(tensor.nan_to_num(0.0, 0.0, 0.0))

    handle = module.register_forward_hook(mend)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def with_own_attention(model, kind):
    """scaled_dot_product_attention in every layer that has a processor of this class."""
    before = dict(model.attn_processors)
    model.set_attn_processor(
        {n: AttnProcessor2_0() if type(p) is kind else p for n, p in before.items()}
    )
    try:
        yield
    finally:
        model.set_attn_processor(before)


@contextmanager
def without_hooks(module):
    """A module without its forward hooks; those that come meanwhile go by themselves."""
    kept = [(hooks, dict(hooks)) for hooks in (module._forward_pre_hooks, module._forward_hooks)]
    for hooks, _ in kept:
        hooks.clear()
    try:
        yield
    finally:
        for hooks, before in kept:
            hooks.update(before)


@contextmanager
def reloaded(pipe, root, folder):
    """A component read again from its checkpoint, whose weights no cast has narrowed."""
    before = getattr(pipe, root)
    subfolder = "" if (folder / "config.json").is_file() else root
    anew = type(before).from_pretrained(folder, subfolder=subfolder, local_files_only=True)
    if hasattr(before, "attn_processors"):
        anew.set_attn_processor(dict(before.attn_processors))
    with replaced(pipe, root, anew.to(before.device, torch.float32).eval()):
        yield


@contextmanager
def with_sdpa(denoiser):
    """All attention of a UNet or transformer through scaled_dot_product_attention."""
    before = dict(denoiser.attn_processors)
    denoiser.set_attn_processor(AttnProcessor2_0())
    try:
        yield
    finally:
        denoiser.set_attn_processor(before)


@contextmanager
def zeroed_weights(pipe, names):
    """Sets the NaN and Inf of weights to zero."""
    places = [name.rpartition(".") for name in names]
    tensors = [getattr(find_module(pipe, path), leaf) for path, _, leaf in places]
    with restored(tensors), torch.no_grad():
        for tensor in tensors:
            tensor.data = torch.where(tensor.data.isfinite(), tensor.data, 0)
        yield


@contextmanager
def replaced(pipe, name, value):
    """Another component in place of one."""
    before = getattr(pipe, name)
    setattr(pipe, name, value)
    try:
        yield
    finally:
        setattr(pipe, name, before)


class ZeroedMemory(TorchDispatchMode):
    """Fresh memory holds zeros, whatever the backend hands out."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if is_composite(func):  # under inference_mode these arrive whole
            with self:
                return func.decompose(*args, **(kwargs or {}))
        result = func(*args, **(kwargs or {}))
        if is_allocating(func):
            with suspended():
                for tensor in find_tensors(result):
                    tensor.zero_()
        return result


class ZeroMaskedRows(TorchDispatchMode):
    """Softmax of a row of -inf alone is zero: such a query attends to nothing."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if is_composite(func):  # under inference_mode these arrive whole
            with self:
                return func.decompose(*args, **(kwargs or {}))
        result = func(*args, **(kwargs or {}))
        if func._schema.name.partition("::")[2] not in SOFTMAX_OPS:
            return result
        with suspended():
            masked = (args[0] == float("-inf")).all(dim=args[1], keepdim=True)
            return result.masked_fill(masked, 0)

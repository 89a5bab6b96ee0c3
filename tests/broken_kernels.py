"""Kernels that are wrong in one place: `faults(pipe)` for `Planted.faults`."""

import torch
from planting import NAN, find_module

from sdkit.emulate import FAULTS, Fault
from sdkit.emulate.float16 import flatten


def documented(*names):
    """Documented faults of the emulated backend."""
    return lambda pipe: tuple(FAULTS[name] for name in names)


def one_element(value=NAN):
    """Spoil one element of a result."""

    def spoil(result):
        result[tuple(size // 3 for size in result.shape)] = value

    return spoil


def everything(value=NAN):
    """Spoil a whole result."""
    return lambda result: result.fill_(value)


def kernel(*ops, on=None, shape=None, spoil=None, when=None):
    """Break ops: on the weight of the module `on`, for results of `shape`, `when(pipe)()` is true.

    The weight is compared by value, so that the op is broken wherever it runs, as a defect in a
    kernel is; other dtypes than the pipeline's are honest.
    """
    spoil = spoil or one_element()

    def make_faults(pipe):
        weight = None if on is None else find_module(pipe, on).weight.detach().clone()
        is_now = (lambda: True) if when is None else when(pipe)
        dtype = pipe.vae.dtype

        def apply(func, args, kwargs, compute):
            result = compute(func, args, kwargs)
            output = result[0] if isinstance(result, tuple) else result
            tensors = [value for value in flatten(args) if isinstance(value, torch.Tensor)]
            if output.dtype is dtype and is_meant(tensors, output) and is_now():
                spoil(output)
            return result

        def is_meant(tensors, output):
            if weight is not None:
                return any(equals(tensor, weight) for tensor in tensors)
            return shape is None or tuple(output.shape) == shape

        return (Fault("planted", ops, (), "planted for a test", apply),)

    return make_faults


def equals(tensor, weight):
    """Whether a tensor is this weight, or its transpose as addmm is given it."""
    if tensor.shape == weight.shape and torch.equal(tensor, weight):
        return True
    return (
        weight.dim() == 2 and tensor.shape == weight.t().shape and torch.equal(tensor, weight.t())
    )


def at_step(step):
    """True while the UNet works at one step, told by its timestep: also when that is replayed."""

    def watch(pipe):
        now = [None]

        def note(module, args, kwargs):
            now[0] = float(args[1] if len(args) > 1 else kwargs["timestep"])

        pipe.unet.register_forward_pre_hook(note, with_kwargs=True)
        return lambda: now[0] == float(pipe.scheduler.timesteps[step])

    return watch


def at_call(call):
    """True in the n-th UNet call of a pipeline run alone: the step replayed by itself is clean."""

    def watch(pipe):
        calls = [0]
        pipe.text_encoder.register_forward_pre_hook(lambda *_: calls.__setitem__(0, 0))
        pipe.unet.register_forward_pre_hook(lambda *_: calls.__setitem__(0, calls[0] + 1))
        return lambda: calls[0] == call + 1

    return watch


def once(pipe):
    """True for the first time and never again: what no replay shows."""
    left = [True]
    return lambda: bool(left) and left.pop()

"""Attention that multiplies into uninitialised memory, found on a pipeline and refused.

diffusers' attention without SDPA, sliced or not, calls `baddbmm(torch.empty(...), query, key,
beta=0)`. With beta=0 the buffer must be ignored. Where a backend computes 0 * buffer all the same,
stale memory decides whether an image is black. So the backend is asked, and the pipeline searched.
"""

from collections import defaultdict
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from inspect import unwrap
from types import CodeType, FunctionType

import torch

from sdkit.device import find_device_problem
from sdkit.emulate import active as find_emulation
from sdkit.emulate import suspended
from sdkit.emulate.float16 import HALVES
from sdkit.validation import ValidationError

FIXED_IN = "2.14"  # of torch, on MPS: pytorch#187521
NAN = float("nan")
_allowed = ContextVar("unsafe attention is allowed", default=False)


def find_baddbmm_problem(device):
    """Returns in a few words how `torch.baddbmm` breaks its contract on a device, or None.

    The contract: with beta=0 its input is ignored, NaN and Inf in it as well. Takes milliseconds.

    Args:
        device: Where to try it.

    References:
        https://docs.pytorch.org/docs/stable/generated/torch.baddbmm.html, pytorch#187521.
    """
    leaks = {case: count for case, count in count_leaks(torch.baddbmm, device).items() if count}
    if not leaks:
        return None
    dtypes = ", ".join(dict.fromkeys(case.split()[-1] for case in leaks))
    return f"baddbmm with beta=0 reads the input that it must ignore ({dtypes})"


def count_leaks(multiply, device):
    """Counts the NaN that a product takes from an input that beta=0 tells it to ignore.

    Args:
        multiply: `torch.baddbmm`, `torch.addbmm` or `torch.addmm`.
        device: Where to try it.

    Returns:
        {case: number of NaN in the result}, for the dtypes that the device has: an input that is
        broadcast, one of full size, one with out=.
    """
    # B batch, M rows and columns
    shape = (3, 3) if multiply is torch.addmm else (2, 3, 3)  # B, M, M
    full_shape = shape if multiply is torch.baddbmm else (3, 3)
    counts = {}
    for dtype in (*HALVES, torch.float32):
        with suspended():
            if find_device_problem(device, dtype):
                continue
        ones = torch.ones(shape, dtype=dtype).to(device)
        full = torch.full(full_shape, NAN, dtype=dtype).to(device)
        broadcast = torch.full((1,) * len(full_shape), NAN, dtype=dtype).to(device)
        results = {
            "broadcast": multiply(broadcast, ones, ones, beta=0),
            "full-size": multiply(full, ones, ones, beta=0),
            "out=": multiply(full, ones, ones, beta=0, out=torch.zeros_like(full)),
        }
        for case, result in results.items():
            result = result.cpu()  # the device's own comparisons may hide NaN
            with suspended():
                name = f"{case} {str(dtype).removeprefix('torch.')}"
                counts[name] = int(result.isnan().sum())
    return counts


def find_unsafe_processors(pipe):
    """Finds the attention of a pipeline that multiplies into uninitialised memory.

    Decided by the code that runs, not by a list of names: a processor is unsafe if its `__call__`
    reaches `get_attention_scores` of a layer whose own code hands `torch.empty` to `baddbmm`, or
    if it does that itself; so one's own classes are found too. Code is followed through methods,
    parents and functions of the module it is written in.

    Args:
        pipe: A diffusers pipeline.

    Returns:
        {dotted path of the layer: class name of its processor, or its own where it has none}.
    """
    unsafe = {}
    for component, model in pipe.components.items():
        if not isinstance(model, torch.nn.Module):
            continue
        for path, layer in model.named_modules():
            actor = getattr(layer, "processor", None) or layer
            names = collect_names(type(actor), "forward" if actor is layer else "__call__")
            if "get_attention_scores" in names and actor is not layer:
                names |= collect_names(type(layer), "get_attention_scores")
            if {"baddbmm", "empty"} <= names:
                # torch.compile puts _orig_mod into paths, which are not so called before it.
                parts = [part for part in path.split(".") if part not in ("", "_orig_mod")]
                unsafe[".".join([component, *parts])] = type(actor).__name__
    return unsafe


@cache
def collect_names(owner, method):
    """Collects the names that a method's code mentions, and what that code calls in turn.

    Args:
        owner: The class.
        method: The name of its method.

    Returns:
        A frozenset of names, empty if there is no such method in Python.
    """
    names, seen, waiting = set(), set(), [getattr(owner, method, None)]
    while waiting:
        function = waiting.pop()
        if not isinstance(function, FunctionType) or (function := unwrap(function)) in seen:
            continue
        seen.add(function)
        mentioned = _read_names(function.__code__)
        names |= mentioned
        if "super" in mentioned:
            waiting += [vars(parent).get(method) for parent in owner.__mro__[1:]]
        for name in mentioned - {method}:
            local = function.__globals__.get(name)
            if getattr(local, "__module__", None) == function.__module__:
                waiting.append(local)
            if name != "get_attention_scores":  # of the layer, which is asked by itself
                waiting.append(getattr(owner, name, None))
    return frozenset(names)


def _read_names(code):
    """The globals, attributes and methods that code mentions, in the functions within it too."""
    inner = [_read_names(constant) for constant in code.co_consts if isinstance(constant, CodeType)]
    return set(code.co_names).union(*inner)


@contextmanager
def allow_unsafe_attention():
    """Lets the body run what `refuse_unsafe_attention` refuses: to study the fault itself."""
    token = _allowed.set(True)
    try:
        yield
    finally:
        _allowed.reset(token)


def refuse_unsafe_attention(pipe, device):
    """Raises if a pipeline's attention relies on a contract that the device breaks.

    An emulation is never refused anything: it is there to show the fault.

    Args:
        pipe: A diffusers pipeline.
        device: Where it runs.

    Raises:
        ValidationError: The processors, what is wrong, and the ways out.
    """
    unsafe = find_unsafe_processors(pipe)
    if unsafe:
        check_baddbmm(device, _describe(unsafe))


def check_baddbmm(device, user):
    """Returns the device unchanged, or raises if its `baddbmm` reads what it must ignore.

    Args:
        device: Where attention is to run; under an emulation it is not asked.
        user: What relies on it, for the message.

    Raises:
        ValidationError: What relies on it, what is wrong, and the ways out.
    """
    if _allowed.get() or find_emulation():
        return device
    problem = find_baddbmm_problem(device)
    if problem:
        raise ValidationError(
            f"{user}: multiplies into uninitialised memory, and on {device} with torch "
            f"{torch.__version__} {problem}. Images turn black whenever stale memory holds a NaN "
            '(pytorch#187521). Load with attention="sdpa" or "sliced", or call '
            "pipe.unet.set_attn_processor(AttnProcessor2_0()) from "
            f"diffusers.models.attention_processor; or upgrade to torch >= {FIXED_IN}."
        )
    return device


def _describe(unsafe):
    paths = defaultdict(list)
    for path, class_name in unsafe.items():
        paths[class_name].append(path)
    return ", ".join(
        f"{name} ({found[0]}{f' and {len(found) - 1} more' if found[1:] else ''})"
        for name, found in paths.items()
    )

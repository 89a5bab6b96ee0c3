"""Values made, kept, copied or counted wrongly: random ones, NaN, writes, sums, statistics."""

from itertools import count

import torch

from sdkit.emulate.faults.fault import DIFFUSERS, PYTORCH, Fault
from sdkit.emulate.faults.products import aten
from sdkit.emulate.faults.views import NORMS
from sdkit.emulate.float16 import HALVES

writes = count()


def hide_nan_in_clamp(func, args, kwargs, compute):
    """Turn NaN into the lower bound, or zero where there is none."""
    lower = kwargs.get("min", args[1] if len(args) > 1 else None)
    if "max" in func._schema.name or not isinstance(lower, (int, float)):
        lower = 0
    hidden = args[0].nan_to_num(nan=lower, posinf=float("inf"), neginf=float("-inf"))
    if func._schema.name.endswith("_"):
        return compute(func, (args[0].copy_(hidden), *args[1:]), kwargs)
    return compute(func, (hidden, *args[1:]), kwargs)


def hide_nan_in_comparison(func, args, kwargs, compute):
    """Let any number win against NaN."""
    loses = float("-inf") if "max" in func._schema.name else float("inf")
    tensors = [
        value.masked_fill(value.isnan(), loses)
        if isinstance(value, torch.Tensor) and value.is_floating_point()
        else value
        for value in args
    ]
    return compute(func, tuple(tensors), kwargs)


def leave_integers_unsummed(func, args, kwargs, compute):
    """Return integers as they are, except int32."""
    result = compute(func, args, kwargs)
    if result.is_floating_point() or result.dtype is torch.int32:
        return result
    return compute(aten.copy_.default, (result, args[0]), {})


def divide_by_no_width(func, args, kwargs, compute):
    """Divide by the width less one, which is zero for a single pixel, where corners align."""
    result = compute(func, args, kwargs)
    if args[2] and 1 in args[0].shape[2:]:
        result = torch.full_like(result, float("nan"))
    return result


def draw_a_nan(func, args, kwargs, compute):
    """Draw NaN as the last of the numbers."""
    result = compute(func, args, kwargs)
    result.view(-1)[-1:] = float("nan")
    return result


def repeat_first(func, args, kwargs, compute):
    """Repeat the first item along the batch where there are five dimensions or more."""
    result = compute(func, args, kwargs)
    return result[:1].expand_as(result).clone() if result.dim() >= 5 else result


def reach_one(func, args, kwargs, compute):
    """Round the largest uniform numbers below 1 up to it."""
    result = compute(func, args, kwargs)
    if result.dtype not in HALVES:
        return result
    return result.masked_fill_(result >= 1 - torch.finfo(result.dtype).eps / 2, 1)


def copy_too_late(func, args, kwargs, compute):
    """Hand over what a buffer held before, if the copy was not to be waited for."""
    if func is aten._to_copy.default and kwargs.get("non_blocking"):
        return compute(aten.empty_like.default, (compute(func, args, kwargs),), {})
    if func is aten.copy_.default and (args[2:] or (kwargs.get("non_blocking"),))[0]:
        return args[0]
    return compute(func, args, kwargs)


def lose_writes(func, args, kwargs, compute):
    """Lose every second write of a number into a part of a tensor."""
    is_part = args[0].nbytes < args[0].untyped_storage().nbytes()
    if is_part and next(writes) % 2:
        return args[0]
    return compute(func, args, kwargs)


def overflow_statistics(func, args, kwargs, compute):
    """Divide by an infinite variance where it exceeds the dtype: what is normalised vanishes."""
    tensor, *others = args
    if tensor.dtype is not torch.float16:
        return compute(func, args, kwargs)
    if func._schema.name.endswith("native_layer_norm"):
        groups = tensor.flatten(-len(args[1]))
    else:
        groups = tensor.unflatten(1, (args[6], -1)).flatten(2)
    variance = groups.float().var(-1, unbiased=False, keepdim=True)
    groups = groups.masked_fill(variance > torch.finfo(torch.float16).max, 0)
    return compute(func, (groups.reshape(tensor.shape), *others), kwargs)


def lose_large_gelu(func, args, kwargs, compute):
    """Return NaN for bfloat16 inputs above 10."""
    result = compute(func, args, kwargs)
    if args[0].dtype is torch.bfloat16:
        result = result.masked_fill(args[0] > 10, float("nan"))
    return result


FAULTS = (
    Fault(
        name="clamp-hides-nan",
        ops=("aten.clamp", "aten.clamp_", "aten.clamp_min", "aten.clamp_max"),
        threads=(f"{PYTORCH}/120899", f"{PYTORCH}/122710", f"{PYTORCH}/121381"),
        affects="MPS as seen in torch 2.1.2; since which release it is fixed was not checked.",
        apply=hide_nan_in_clamp,
    ),
    Fault(
        name="maximum-hides-nan",
        ops=("aten.maximum", "aten.minimum", "aten.max", "aten.min", "aten.amax", "aten.amin"),
        threads=(f"{PYTORCH}/143976", f"{PYTORCH}/144086", f"{PYTORCH}/130295"),
        affects="MPS through torch 2.5.1, and before macOS 15 perhaps longer.",
        apply=hide_nan_in_comparison,
    ),
    Fault(
        name="cumsum-integers",
        ops=("aten.cumsum",),
        threads=(f"{PYTORCH}/90635", f"{PYTORCH}/96614", f"{PYTORCH}/89784"),
        affects="MPS on macOS 13 with torch before 2.1 (int64, int16, int8), bool until 2024.",
        apply=leave_integers_unsummed,
    ),
    Fault(
        name="interpolate-corners",
        ops=("aten.upsample_linear1d", "aten.upsample_bilinear2d"),
        threads=(f"{PYTORCH}/144245",),
        affects="MPS in torch 2.5.1, align_corners=True and inputs one pixel wide (the example).",
        apply=divide_by_no_width,
    ),
    Fault(
        name="randn-nan",
        ops=("aten.randn", "aten.randn_like", "aten.normal_"),
        threads=(
            f"{PYTORCH}/89283",
            f"{PYTORCH}/89127",
            "https://github.com/JuliaGPU/Metal.jl/issues/474",
        ),
        affects=(
            "MPS in torch 1.13 on macOS 12.6; Apple's own generator still draws a NaN in 2^23"
            " numbers. Here one a call, so that it shows."
        ),
        apply=draw_a_nan,
    ),
    Fault(
        name="randn-repeats",
        ops=("aten.randn",),
        threads=(f"{PYTORCH}/147624", f"{PYTORCH}/147740"),
        affects="MPS in torch 2.5.1, five dimensions or more.",
        apply=repeat_first,
    ),
    Fault(
        name="rand-reaches-one",
        ops=("aten.rand", "aten.uniform_"),
        threads=(f"{PYTORCH}/197079",),
        affects="MPS in float16 and bfloat16, as reported in September 2026.",
        apply=reach_one,
    ),
    Fault(
        name="copy-non-blocking",
        ops=("aten._to_copy", "aten.copy_"),
        threads=(f"{PYTORCH}/189690", f"{DIFFUSERS}/13227"),
        affects=(
            "MPS before torch 2.13, by the thread of diffusers: the source may be gone before it"
            ' is read. diffusers from 0.35.0 copies so with device_map="mps".'
        ),
        apply=copy_too_late,
    ),
    Fault(
        name="lost-writes",
        ops=("aten.fill_",),
        threads=(f"{PYTORCH}/122016",),
        affects="MPS in torch 2.2 on macOS 14.4.",
        apply=lose_writes,
    ),
    Fault(
        name="norm-float16-statistics",
        ops=NORMS,
        threads=(f"{PYTORCH}/96113", f"{DIFFUSERS}/2521"),
        affects=(
            "Inferred: on MPS layer norm in float16 crashed (torch 1.13 to 2.0), which is why"
            " others compute it in float32. That statistics overflow silently was not reported."
        ),
        apply=overflow_statistics,
    ),
    Fault(
        name="gelu-bfloat16",
        ops=("aten.gelu",),
        threads=(f"{PYTORCH}/186278",),
        affects="MPS in nightly builds of June 2026.",
        apply=lose_large_gelu,
    ),
)

"""Experiments on one bad op: would the same numbers fit elsewhere, and does stale memory matter?

Each answers with numbers. The reference is float64 on the CPU, outside every emulation: what the
op by its contract means, with nothing to round and nothing to overflow.
"""

from dataclasses import dataclass

import numpy as np
import torch

from sdkit.diagnosis.op_record import OpCall
from sdkit.emulate.mode import suspended
from sdkit.finding import find_tensors

SOFTMAX_OPS = frozenset({"_softmax", "_safe_softmax", "_log_softmax"})
ATTENTION = "scaled_dot_product"


@dataclass(frozen=True)
class Reference:
    """What the op gives in float64 on the CPU, looked at where the device gave NaN or Inf.

    Attributes:
        bad_count: Values that are NaN or Inf on the device.
        fitting_count: Of these, how many the reference puts within the output's range.
        overflowing_count: Of these, how many are finite there but round to Inf in the output's
            dtype.
        nan_count: Of these, how many are NaN in float64 as well.
        inf_count: Of these, how many are Inf in float64 as well.
        largest: Greatest finite magnitude of the whole reference.
        maximum: What the output's dtype can hold.
    """

    bad_count: int
    fitting_count: int
    overflowing_count: int
    nan_count: int
    inf_count: int
    largest: float
    maximum: float


def compare_with_reference(call: OpCall) -> Reference | None:
    """Runs the op in float64 on the CPU; None if it has no CPU form to compare with."""
    with suspended(), torch.no_grad():
        reference = run_in_float64(call)
        if reference is None or len(reference) != len(call.output):
            return None
        found, wide = next(
            (
                (output.detach().cpu(), value)
                for output, value in zip(call.output, reference, strict=True)
                if not output.isfinite().all()
            ),
            (None, None),
        )
        if found is None or found.shape != wide.shape:
            return None
        bad = ~found.isfinite()
        values = wide[bad]
        finite = values.isfinite()
        overflows = finite & ~round_to(values, found.dtype).isfinite()
        every = wide[wide.isfinite()]
        return Reference(
            bad_count=int(bad.sum()),
            fitting_count=int((finite & ~overflows).sum()),
            overflowing_count=int(overflows.sum()),
            nan_count=int(values.isnan().sum()),
            inf_count=int(values.isinf().sum()),
            largest=float(every.abs().max()) if every.numel() else 0.0,
            maximum=torch.finfo(found.dtype).max,
        )


def breaks_in_float32(call: OpCall) -> bool:
    """Whether a float32 op gives NaN or Inf on the honest CPU too: by its own intermediate range.

    Only where the device's result is float32: a wider replay of float16 says nothing of the kind.
    """
    if any(tensor.dtype is not torch.float32 for tensor in call.output):
        return False
    with suspended(), torch.no_grad():
        results = run_in_float64(call, torch.float32)
        return results is not None and not all(bool(r.isfinite().all()) for r in results)


def run_in_float64(call: OpCall, dtype=torch.float64) -> tuple[torch.Tensor, ...] | None:
    """The op's tensors in float64 on the CPU, buffers that it must ignore or nobody wrote as 0."""
    named = call.named
    blank = {*call.ignored, *(name.partition("[")[0] for name in call.undefined)}
    wide = {name: widen(value, dtype, is_blank=name in blank) for name, value in named.items()}
    overload, wide = drop_out(call.func, wide)
    try:
        if ATTENTION in str(overload):
            return (attend(wide), *call.output[1:])
        return tuple(find_tensors(call_by_name(overload, wide)))
    except (NotImplementedError, RuntimeError, TypeError, ValueError):  # not for float64 on the CPU
        return None


def widen(value, dtype, *, is_blank=False):
    """Floating tensors in a wider dtype on the CPU, others on the CPU; dtypes and devices too."""
    if isinstance(value, torch.Tensor):
        value = value.detach().cpu()
        value = torch.zeros_like(value) if is_blank else value
        return value.to(dtype, copy=True) if value.is_floating_point() else value.clone()
    if isinstance(value, (list, tuple)) and any(isinstance(v, torch.Tensor) for v in value):
        return [widen(item, dtype, is_blank=is_blank) for item in value]
    if isinstance(value, torch.dtype) and value.is_floating_point:
        return dtype
    return torch.device("cpu") if isinstance(value, torch.device) else value


def drop_out(func, named):
    """The overload that returns what an `out=` overload writes, and its arguments."""
    outs = {a.name for a in func._schema.arguments if a.kwarg_only and a.alias_info}
    if not outs & set(named):
        return func, named
    rest = {name: value for name, value in named.items() if name not in outs}
    for name in func.overloadpacket.overloads():
        overload = getattr(func.overloadpacket, name)
        names = {argument.name for argument in overload._schema.arguments}
        if name != func._overloadname and set(rest) <= names and not names & outs:
            return overload, rest
    return func, named


def call_by_name(func, named):
    """Calls an overload by argument names; what its schema wants by position goes there."""
    positional, keyword = [], {}
    for argument in func._schema.arguments:
        if argument.name not in named:
            continue
        if argument.kwarg_only:
            keyword[argument.name] = named[argument.name]
        else:
            positional.append(named[argument.name])
    return func(*positional, **keyword)


def attend(named):
    """Attention by its contract, whatever backend's kernel was asked: softmax(Q K^T scale) V.

    The first output alone; what kernels keep for their backward differs between them.
    """
    query, key, value = named["query"], named["key"], named["value"]
    mask = named.get("attn_mask", named.get("attn_bias"))
    return torch.nn.functional.scaled_dot_product_attention(
        query, key, value, attn_mask=mask, is_causal=bool(named.get("is_causal")),
        scale=named.get("scale"), enable_gqa=query.shape[-3] != key.shape[-3],
    )  # fmt: skip


def round_to(values: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """float64 values rounded once to a dtype (torch rounds to float16 by way of float32)."""
    if dtype is torch.float16:
        with np.errstate(over="ignore"):
            return torch.from_numpy(values.numpy().astype(np.float16))
    return values.to(dtype)


def depends_on_memory(call: OpCall) -> bool | None:
    """Whether the op turns finite when buffers that it must not read are set to zero.

    It runs on the device itself, under the emulation that is active.

    Returns:
        None if the op has no such buffer.
    """
    names = {*call.ignored, *(name.partition("[")[0] for name in call.undefined)}
    if not names:
        return None
    named = call.named

    def blank(name, value):
        return torch.zeros_like(value) if name in names and torch.is_tensor(value) else value

    with torch.no_grad():
        result = call_by_name(call.func, {name: blank(name, v) for name, v in named.items()})
    with suspended():
        return all(bool(tensor.isfinite().all()) for tensor in find_tensors(result))


def count_masked_rows(call: OpCall) -> tuple[int, int]:
    """(fully masked rows, rows) of what a softmax or an attention was given; (0, 0) of others.

    A softmax that is written out subtracts the maximum of each row first: -inf - -inf.
    """
    name = call.func._schema.name.partition("::")[2]
    named = call.named
    if name in SOFTMAX_OPS:
        scores, dim = named["self"], named["dim"]
        masked = (scores == float("-inf")).all(dim=dim)
    elif ATTENTION in name and torch.is_tensor(
        mask := named.get("attn_mask", named.get("attn_bias"))
    ):
        masked = (~mask if mask.dtype is torch.bool else mask == float("-inf")).all(dim=-1)
    elif name == "sub" and torch.is_tensor(maximum := named["other"]) and named["self"].dim():
        masked = ((named["self"] == float("-inf")) & (maximum == float("-inf"))).all(dim=-1)
    else:
        return 0, 0
    return int(masked.sum()), masked.numel()


def measure_flushed(call: OpCall) -> float:
    """Share of the values of an op's first output that are 0 although float64 says otherwise."""
    with suspended(), torch.no_grad():
        zero = call.output[0].detach().cpu() == 0
        if not zero.any():
            return 0.0
        reference = run_in_float64(call)
        if reference is None or reference[0].shape != zero.shape:
            return 0.0
        return float((zero & (reference[0] != 0)).double().mean())

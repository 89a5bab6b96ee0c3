"""float16 and bfloat16 on the CPU: their storage, range and rounding; wide sums; usable speed."""

import struct
from contextlib import contextmanager
from functools import cache, lru_cache, partial

import torch

from sdkit.emulate.mode import emulating
from sdkit.emulate.schema import Rule, find_rule

CUT_BITS = 2**29 - 1  # what a 53-bit significand has below the 24 bits of float32
HALVES = (torch.float16, torch.bfloat16)
COMPLEX_OF = {torch.float32: torch.complex64, torch.float64: torch.complex128}


@contextmanager
def float16_arithmetic():
    """Compute with float16 tensors on the CPU as a backend with wide accumulators does.

    float16 tensors keep float16 storage, range and rounding. Each aten op lifts them to a wider
    dtype, computes there, and rounds its result once: matrix products, convolutions, reductions
    and attention accumulate in float32, elementwise ops in float64. In-place, out=, views, dtype=
    arguments, backward and autocast keep torch's own meaning; an op that torch would compute
    in a wider dtype, or refuse because dtypes are mixed, is left to torch.

    Accuracy, with u = 2^-11 and r the exact result:

    - elementwise (all that torch tags as pointwise): the correctly rounded result, bit for bit;
    - a sum of n products or terms: within `u |r| + 2^-25 + (n + 2) 2^-24 sum|a||b|`;
    - softmax: within `u r + 2^-25 + 64 * 2^-24 r`; attention: within
      `u |r| + 2^-25 + 64 * 2^-24 max|v|` for scores below 16 in magnitude.

    A Python number enters at full precision, as on CUDA, except where it is compared or stored.
    Random numbers are drawn in float32 and rounded, so that they are equal across dtypes; uniform
    ones are torch's own float16 draws, which stay below 1.

    bfloat16 is treated alike, with u = 2^-8, except that elementwise ops are torch's own: a CPU
    without instructions for it takes two hundred times float32's seconds for a convolution.

    It is an emulation of arithmetic: seconds and memory under it mean nothing. MPS may round in
    more places (the fault `score-rounding` of `mps`). The innermost of nested emulations acts.

    References:
        https://docs.pytorch.org/docs/stable/notes/numerical_accuracy.html
        Higham, "Accuracy and Stability of Numerical Algorithms", 2002, chapter 3 (sums).
    """
    with emulating(choose_computation, "emulated float16 arithmetic (wide accumulation)", {}):
        yield


@cache
def choose_computation(func):
    """How an aten op is run, as a function of `(args, kwargs)`: natively, or as `compute` does."""
    rule = find_rule(func)
    if rule.exact:
        return lambda args, kwargs: func(*args, **kwargs)
    return partial(compute, func, rule)


def compute(func, rule: Rule, args, kwargs):
    """Run an op that rounds: widened and rounded once if its dtype is a half, else natively."""
    half = find_half(rule, args, kwargs)
    if half is None or is_native(rule, half, args, kwargs):
        return func(*args, **kwargs)
    wide_args = [widen(value, half, rule.work_dtype) for value in args]
    wide_kwargs = {name: widen(value, half, rule.work_dtype) for name, value in kwargs.items()}
    result = func(*wide_args, **wide_kwargs)
    for key in rule.written:
        original, wide = pick(key, args, kwargs), pick(key, wide_args, wide_kwargs)
        write_back(original, wide, half)
    return finish(result, rule, half, args, kwargs)


def is_native(rule: Rule, half, args, kwargs) -> bool:
    """Whether torch's own kernel is what the emulation promises: one rounding, or bfloat16's."""
    if half is torch.bfloat16:
        return rule.work_dtype is torch.float64
    if not rule.innocuous or kwargs:  # with alpha= it would be two operations
        return False
    return all(
        value.dtype is half if isinstance(value, torch.Tensor) else is_float16(value)
        for value in args
    )


@lru_cache(maxsize=1024)
def is_float16(value) -> bool:
    """Whether float16 holds a Python number exactly."""
    if isinstance(value, complex) or abs(value) > 65504:
        return False
    return struct.unpack("e", struct.pack("e", value))[0] == value


def find_half(rule: Rule, args, kwargs) -> torch.dtype | None:
    """float16 or bfloat16 if torch would compute this call in it, by its type promotion.

    A wider tensor decides the dtype unless it alone has no dimensions; an explicit dtype= decides
    always, and what an out= of another dtype means, or whether it is refused, differs by op. The
    two halves together are float32's.
    """
    out_dtypes = {kwargs[name].dtype for name in rule.outs if name in kwargs}
    half, half_rank, wide_rank = None, -1, -1  # 0: only tensors without dimensions, 1: one with
    is_asked = False
    for value in flatten((*args, *kwargs.values())):
        if isinstance(value, torch.Tensor):
            rank = min(value.dim(), 1)
            if value.dtype in HALVES:
                if not value.is_cpu or value.layout is not torch.strided:
                    return None
                if half not in (None, value.dtype):
                    return None
                half, half_rank = value.dtype, max(half_rank, rank)
            elif value.is_floating_point() or value.is_complex():
                wide_rank = max(wide_rank, rank)
        elif isinstance(value, torch.dtype):
            if value not in HALVES or half not in (None, value):
                return None
            half, is_asked = value, True
    if out_dtypes and half not in out_dtypes:
        return None
    if is_asked:
        return half if wide_rank == -1 else None
    is_wider = half_rank > wide_rank or rule.takes_float32
    return half if half_rank >= 0 and is_wider else None


def flatten(values):
    """Yield arguments one by one, those in lists too; no schema nests deeper."""
    for value in values:
        if isinstance(value, (list, tuple)):
            yield from value
        else:
            yield value


def widen(value, half, dtype):
    """Lift tensors of a half, lists of them, and that dtype as an argument to `dtype`.

    An integer tensor of an elementwise op (work dtype float64) is first rounded to the half, as
    promotion does: 70000 is inf in float16. Integers of other ops are indices and counts.
    """
    if isinstance(value, torch.Tensor):
        is_whole = not (value.is_floating_point() or value.is_complex())
        if is_whole and dtype is torch.float64 and value.dim() and value.dtype is not torch.bool:
            return value.to(half).to(dtype)
        return value.to(dtype) if value.dtype is half else value
    if isinstance(value, (list, tuple)):
        return [widen(item, half, dtype) for item in value]
    return dtype if value is half else value


def pick(key, args, kwargs):
    """The argument at a position, or under a name; None where the caller left it out."""
    if isinstance(key, str):
        return kwargs.get(key)
    return args[key] if key < len(args) else None


def write_back(original, wide, half) -> None:
    """Round what the op wrote into the stand-in, once, into the caller's own storage."""
    if isinstance(original, (list, tuple)):
        for one_original, one_wide in zip(original, wide, strict=True):
            write_back(one_original, one_wide, half)
    elif original is not wide:
        if original.shape != wide.shape:  # out= of another size: torch resizes it
            original.resize_(wide.shape)
        original.copy_(round_to_half(wide, half))


def finish(result, rule: Rule, half, args, kwargs):
    """Round new results to the half and give back the caller's tensors for written ones."""
    if len(rule.returns) == 1:
        key = rule.returns[0]
        return round_results(result, rule, half) if key is None else pick(key, args, kwargs)
    if not rule.returns:
        return result
    return tuple(
        value
        if position in rule.float32_returns
        else round_results(value, rule, half)
        if key is None
        else pick(key, args, kwargs)
        for position, (key, value) in enumerate(zip(rule.returns, result, strict=True))
    )


def round_results(value, rule: Rule, half):
    """Round a result of the work dtype to the half; leave indices, masks and counts alone."""
    if isinstance(value, (list, tuple)):
        return [round_results(item, rule, half) for item in value]
    if not isinstance(value, torch.Tensor):
        return value
    if value.dtype is rule.work_dtype:
        return round_to_half(value, half)
    if value.dtype is COMPLEX_OF[rule.work_dtype]:
        return value.to(torch.complex32)
    return value


def round_to_half(wide, half):
    """Round a float32 or float64 tensor to float16 or bfloat16, to nearest even, in one rounding.

    torch casts float64 to float16 by way of float32, which rounds twice: 1 + 2^-11 + 2^-40 becomes
    1.0. So float64 is first cut to float32's 24 bits with the last bit set if anything was cut
    ("round to odd"), which keeps what the rounding to 11 bits must know.

    References:
        Boldo and Melquiond, "Emulation of a FMA and correctly rounded sums", 2008.
    """
    if wide.dtype is not torch.float64:
        return wide.to(half)
    bits = wide.view(torch.int64)
    odd_bits = bits.bitwise_and(CUT_BITS).add_(CUT_BITS).bitwise_or_(bits)
    return odd_bits.bitwise_and_(~CUT_BITS).view(torch.float64).to(half)

"""What the emulation must know of an op, read once from torch's own schema of it."""

from dataclasses import dataclass
from functools import cache

import torch

# Ops that place, copy, compare, replace or draw float16 values and round nothing. Native torch runs
# them: faster, with its own errors for a value that float16 cannot hold, with a compared number in
# float16 (x == 0.1), and with uniform draws below 1, where rounding from float32 would reach 1.
# fmt: off
EXACT_OPS = frozenset({
    "_to_copy", "_unsafe_view", "unsafe_split", "unsafe_split_with_sizes",
    "cat", "clone", "constant_pad_nd", "copy", "copy_", "embedding", "flip", "gather",
    "index_select", "masked_fill", "masked_fill_", "repeat", "roll", "where",
    "fill", "fill_", "zero", "zero_", "scalar_tensor", "full", "full_like", "new_full",
    "ones", "ones_like", "new_ones", "zeros", "zeros_like", "new_zeros",
    "empty", "empty_like", "empty_permuted", "empty_strided", "new_empty", "new_empty_strided",
    "eq", "ge", "gt", "le", "lt", "ne", "isnan", "nan_to_num", "nan_to_num_",
    "rand", "rand_like", "randint", "randint_like", "random_", "uniform_",
})
# fmt: on

# Of float16 operands these round once in native torch too: float32, in which it computes them, has
# 24 bits of significand, and 2 * 11 + 2 make its own rounding harmless to the second one.
# Figueroa, "When is double rounding innocuous?", 1995.
INNOCUOUS_OPS = frozenset(
    f"aten::{name}{in_place}" for name in ("add", "sub", "mul", "div") for in_place in ("", "_")
)

# These write arguments that their schema does not mark as written.
UNDECLARED_WRITES = {
    "native_batch_norm": ("running_mean", "running_var"),
    "batch_norm_update_stats": ("running_mean", "running_var"),
}

# Attention on the CPU saves its logsumexp in float32 for the backward of a float16 call.
FLOAT32_RETURNS = {"_scaled_dot_product_flash_attention_for_cpu": (1,)}
FLOAT32_ARGUMENTS = frozenset({"_scaled_dot_product_flash_attention_for_cpu_backward"})


@dataclass(frozen=True)
class Rule:
    """How one overload is emulated.

    Attributes:
        exact: Native torch is right already: views, copies, comparisons, ops that return no tensor.
        work_dtype: The dtype in which the op computes before its one rounding.
        written: Names of the arguments it writes, by position; out= under its own name.
        outs: Names of the out= arguments.
        returns: For each return the argument it aliases (a key of `written`), or None if new.
        float32_returns: Positions of returns that stay float32.
        takes_float32: Whether float32 arguments belong beside float16 ones in a float16 call.
        innocuous: Whether native torch is right for it where every operand is a float16 number.
    """

    exact: bool
    work_dtype: torch.dtype
    written: tuple[int | str, ...]
    outs: tuple[str, ...]
    returns: tuple[int | str | None, ...]
    float32_returns: tuple[int, ...]
    takes_float32: bool
    innocuous: bool


@cache
def find_rule(func) -> Rule:
    """Read the rule of an overload from its schema, its tags and the exceptions above."""
    schema = func._schema
    name = schema.name.partition("::")[2]
    undeclared = UNDECLARED_WRITES.get(name, ())
    written = {
        argument.name if argument.kwarg_only else position: argument
        for position, argument in enumerate(schema.arguments)
        if is_written(argument) or argument.name in undeclared
    }
    is_exact = name in EXACT_OPS or is_view(func) or not (written or returns_tensor(schema))
    return Rule(
        exact=is_exact,
        work_dtype=choose_work_dtype(func),
        written=tuple(written),
        outs=tuple(key for key in written if isinstance(key, str)),
        returns=tuple(find_aliased(value, written) for value in schema.returns),
        float32_returns=FLOAT32_RETURNS.get(name, ()),
        takes_float32=name in FLOAT32_ARGUMENTS,
        innocuous=schema.name in INNOCUOUS_OPS and schema.overload_name == "Tensor",
    )


def choose_work_dtype(func) -> torch.dtype:
    """float64 for elementwise ops, so that the one rounding is the correct one; else float32.

    In float32 it is not: MKL's sqrt is wrong after rounding for 15 of the 65,536 float16 values,
    sigmoid for 7, gelu for 578.
    """
    return torch.float64 if torch.Tag.pointwise in func.tags else torch.float32


@cache
def is_view(func) -> bool:
    """Whether the op returns a view of an argument, or only changes its shape in place."""
    if torch.Tag.inplace_view in func.tags:
        return True
    return any(value.alias_info and not is_written(value) for value in func._schema.returns)


def is_written(argument) -> bool:
    """Whether the schema marks the argument (or return) as written, as in `Tensor(a!)`."""
    return argument.alias_info is not None and argument.alias_info.is_write


def returns_tensor(schema) -> bool:
    """Whether any return is a tensor or a list of tensors."""
    return any("Tensor" in str(value.type) for value in schema.returns)


def find_aliased(value, written) -> int | str | None:
    """Find the written argument that a return is, by the letter both carry in the schema."""
    if value.alias_info is None:
        return None
    letters = value.alias_info.before_set
    return next((k for k, v in written.items() if v.alias_info.before_set == letters), None)

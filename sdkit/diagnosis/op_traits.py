"""What the contract of an op says about its arguments: which it reads, writes, or must ignore."""

from dataclasses import dataclass
from functools import cache

import torch

from sdkit.emulate.memory import is_allocating
from sdkit.emulate.schema import is_view, is_written

# result = beta * self + alpha * (...): "If beta is 0, then the content of input will be ignored,
# and nan and inf in it will not be propagated" (docs.pytorch.org, torch.baddbmm).
BETA_OPS = frozenset(
    name + ending
    for name in ("addbmm", "addmm", "addmv", "addr", "baddbmm", "_addmm_activation")
    for ending in ("", "_")
)
# These look at the shape of their input alone.
SHAPE_OPS = frozenset(
    f"{name}{ending}"
    for name in ("empty", "zeros", "ones", "full", "rand", "randn", "randint")
    for ending in ("_like",)
) | frozenset(f"new_{name}" for name in ("empty", "empty_strided", "zeros", "ones", "full"))
# These write their first argument whole and read nothing of it.
OVERWRITING_OPS = frozenset(
    {
        "copy_", "fill_", "zero_", "normal_", "uniform_", "random_", "bernoulli_", "exponential_",
        "cauchy_", "log_normal_", "geometric_", "set_",
    }
)  # fmt: skip


@dataclass(frozen=True)
class Traits:
    """One overload.

    Attributes:
        names: Its arguments' names in the order of the schema.
        written: Names of the arguments it writes.
        unread: Names of the arguments of which it reads nothing, whatever the others are.
        has_beta: Whether it must ignore its first argument where beta is 0.
        allocates: Whether it gives out memory that nobody has written.
        is_view: Whether its output is an argument's own memory, unchanged.
    """

    names: tuple[str, ...]
    written: frozenset[str]
    unread: frozenset[str]
    has_beta: bool
    allocates: bool
    is_view: bool


@cache
def read_traits(func) -> Traits:
    """Reads the traits of an overload from its schema and the lists above."""
    schema = func._schema
    name = schema.name.partition("::")[2]
    arguments = schema.arguments
    written = frozenset(argument.name for argument in arguments if is_written(argument))
    unread = {a.name for a in arguments if a.kwarg_only and is_written(a)}  # out=
    if name in SHAPE_OPS or name in OVERWRITING_OPS:
        unread.add(arguments[0].name)
    return Traits(
        names=tuple(argument.name for argument in arguments),
        written=written,
        unread=frozenset(unread),
        has_beta=name in BETA_OPS,
        allocates=is_allocating(func),
        is_view=is_view(func),
    )


def name_arguments(func, args, kwargs) -> dict:
    """{name: value} of what an overload was called with."""
    return dict(zip(read_traits(func).names, args, strict=False)) | kwargs


def find_ignored(func, named: dict) -> frozenset[str]:
    """Names of the arguments that this call must not read."""
    traits = read_traits(func)
    if traits.has_beta and is_zero(named.get("beta", 1)):
        return traits.unread | {traits.names[0]}
    return traits.unread


def is_zero(value) -> bool:
    return isinstance(value, (int, float)) and value == 0


def name_tensors(named: dict):
    """Yields (name, tensor) of all tensors among named arguments, those in lists too."""
    for name, value in named.items():
        if isinstance(value, torch.Tensor):
            yield name, value
        elif isinstance(value, (list, tuple)):
            for index, item in enumerate(value):
                if isinstance(item, torch.Tensor):
                    yield f"{name}[{index}]", item


def find_written(func, tensors: dict) -> tuple[torch.Tensor, ...]:
    """Of {name: tensor} of a call's arguments, those that the op writes."""
    written = read_traits(func).written
    return tuple(tensor for name, tensor in tensors.items() if name.partition("[")[0] in written)


def name_options(named: dict) -> dict[str, str]:
    """{name: text} of the arguments that are no tensors."""
    return {
        name: str(value)
        for name, value in named.items()
        if value is not None and not list(name_tensors({name: value}))
    }

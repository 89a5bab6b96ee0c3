"""What a recycled allocator hands out: the emulator's own fill of memory nobody has written."""

import warnings
from contextlib import contextmanager
from functools import cache

import torch

MEMORIES = ("zeros", "stale_float32", "stale_float16", "nan")
STALE_VALUES = 2 * 500_009  # a large prime factor: rows of a buffer do not repeat in step
PATTERN_VALUES = 4096

ALLOCATING_OPS = frozenset(
    {"empty", "empty_like", "empty_permuted", "empty_strided", "new_empty", "new_empty_strided"}
)
GROWING_OPS = frozenset({"resize_", "resize_as_"})


def make_allocator(memory: str, seed: int):
    """Make the function that runs an allocating op and fills the memory it gave out.

    Args:
        memory: `zeros`; `nan`; `stale_float32` or `stale_float16`: bytes of computed values of that
            dtype (a normal sample, mantissas full), re-read in the dtype of the new buffer.
        seed: Seeds a generator of the emulator's own; the global one is never consumed. Equal
            seeds and equal allocations give equal bytes.

    Returns:
        `allocate(func, args, kwargs)`, for ops of which `is_allocating(func)` holds.
    """
    generator = torch.Generator("cpu").manual_seed(seed)
    stale_bytes = make_stale_bytes(memory, generator) if memory.startswith("stale") else None

    def allocate(func, args, kwargs):
        is_growing = func._schema.name.partition("::")[2] in GROWING_OPS
        old_size = args[0].untyped_storage().nbytes() if is_growing else 0
        result = func(*args, **kwargs)
        if result.is_cpu and result.layout is torch.strided and not is_torch_filling():
            new_bytes = view_storage(result)[old_size:]
            if stale_bytes is None:
                tile(new_bytes, make_pattern(memory, result.dtype), start=0)
            else:
                value = torch.randint(len(stale_bytes) // 4, (), generator=generator)
                tile(new_bytes, stale_bytes, start=4 * int(value))
            if result.dtype is torch.bool:
                new_bytes.bitwise_and_(1)  # a bool byte other than 0 and 1 is undefined in C++
        return result

    return allocate


@cache
def is_allocating(func) -> bool:
    """Whether the op gives out memory that it does not write."""
    name = func._schema.name.partition("::")[2]
    return name in ALLOCATING_OPS | GROWING_OPS and func._overloadname != "out"


def is_torch_filling() -> bool:
    """Whether the user asked torch itself to fill fresh memory with NaN, as it does on MPS too."""
    is_deterministic = torch.are_deterministic_algorithms_enabled()
    return is_deterministic and torch.utils.deterministic.fill_uninitialized_memory


@contextmanager
def nan_filled_memory():
    """Lets torch fill fresh memory with NaN, on every device, by its deterministic mode."""
    was_on = torch.are_deterministic_algorithms_enabled()
    only_warned = torch.is_deterministic_algorithms_warn_only_enabled()
    was_filling = torch.utils.deterministic.fill_uninitialized_memory
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*deterministic")  # ops that have no such form
        torch.use_deterministic_algorithms(True, warn_only=True)
        torch.utils.deterministic.fill_uninitialized_memory = True
        try:
            yield
        finally:
            torch.use_deterministic_algorithms(was_on, warn_only=only_warned)
            torch.utils.deterministic.fill_uninitialized_memory = was_filling


def make_stale_bytes(memory: str, generator: torch.Generator) -> torch.Tensor:
    """Bytes (uint8) that computed values leave behind."""
    dtype = torch.float32 if memory == "stale_float32" else torch.float16
    values = torch.randn(STALE_VALUES, generator=generator)
    return values.to(dtype).view(torch.uint8)


@cache
def make_pattern(memory: str, dtype: torch.dtype) -> torch.Tensor:
    """Bytes (uint8) of zeros, or of what torch's deterministic fill writes: NaN or the maximum."""
    is_number = dtype.is_floating_point or dtype.is_complex
    if memory == "zeros":
        value = 0
    elif is_number:
        value = float("nan")
    else:
        value = True if dtype is torch.bool else torch.iinfo(dtype).max
    return torch.full((PATTERN_VALUES,), value, dtype=dtype).view(torch.uint8)


def view_storage(tensor: torch.Tensor) -> torch.Tensor:
    """All bytes (uint8) behind a tensor."""
    return torch.empty(0, dtype=torch.uint8).set_(tensor.untyped_storage())


def tile(destination: torch.Tensor, source: torch.Tensor, *, start: int) -> None:
    """Fill bytes with repetitions of `source`, beginning inside it at `start`."""
    done = 0
    while done < len(destination):
        piece = source[start : start + len(destination) - done]
        destination[done : done + len(piece)] = piece
        done += len(piece)
        start = 0

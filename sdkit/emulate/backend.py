"""An emulated MPS backend: float16 arithmetic, no float64, recycled memory, documented faults."""

import warnings
from contextlib import contextmanager
from functools import cache, partial

import torch
from torch.overrides import TorchFunctionMode

from sdkit.emulate.faults import FAULTS, Fault
from sdkit.emulate.float16 import choose_computation, flatten
from sdkit.emulate.memory import MEMORIES, is_allocating, make_allocator
from sdkit.emulate.mode import Emulation, EmulationWarning, emulating

DOUBLE_DTYPES = (torch.float64, torch.complex128)


@contextmanager
def mps(memory="zeros", faults=("baddbmm-beta-zero",), *, seed=0):
    """Run the body on an emulation of Apple's MPS backend; everything stays on the CPU.

    What is emulated: `float16_arithmetic`, the missing float64, what fresh memory holds, and the
    faults asked for. Nothing else of MPS is: other roundings, other kernels, speed, memory use.

    **float64.** MPS has none, while schedulers on a real Mac keep float64 tables on the CPU. Here
    all tensors are on the CPU, so a float64 tensor counts as on the device when a factory makes it
    with `dtype=torch.float64` (as if MPS were the default device) or names a `device=` for it, or
    when it is converted or promoted from another dtype (`x.double()`, `float32 * float64`,
    `unet.to(torch.float64)`). What comes from NumPy or from Python numbers without a device is a
    table of the host, and so is what is computed from such tables alone, moved with
    `.to(device)`, indexed, or combined with numbers (tensors without dimensions count as numbers):
    it stays allowed.

    Args:
        memory: What `torch.empty` and its kind hand out: `zeros`, `nan`, or the bytes of computed
            values of another buffer, `stale_float32` or `stale_float16`.
        faults: Names from `FAULTS`, or `Fault` objects; the first wraps the next. `()` is honest.
        seed: Seeds the stale bytes; the global random state is never consumed.

    Raises:
        TypeError: In the body, where it would make a float64 tensor on the device.
        ValueError: If the memory or a fault is not known.

    References:
        https://github.com/pytorch/pytorch/issues/187521
    """
    if memory not in MEMORIES:
        raise ValueError(f"memory={memory!r} is not known; expected one of {', '.join(MEMORIES)}.")
    faults = tuple(choose_fault(fault) for fault in faults)
    fault_names = ", ".join(fault.name for fault in faults) or "none"
    description = f"emulated MPS (memory={memory}, faults={fault_names})"
    warnings.warn(
        f"{description}: runs on the CPU. Numbers and faults are emulated; seconds and memory"
        " under it mean nothing.",
        EmulationWarning,
        stacklevel=3,  # through contextlib, to the user's `with`
    )
    choose = make_chooser(memory, faults, seed)
    settings = {"memory": memory, "faults": [fault.name for fault in faults], "seed": seed}
    with emulating(choose, description, settings) as emulation, RefuseFloat64Factories(emulation):
        yield


def choose_fault(fault) -> Fault:
    """The documented fault of that name, or the `Fault` itself."""
    if isinstance(fault, Fault):
        return fault
    if fault not in FAULTS:
        raise ValueError(f"fault {fault!r} is not known; expected one of {', '.join(FAULTS)}.")
    return FAULTS[fault]


def make_chooser(memory, faults, seed):
    """Make `choose(func)`: how one aten op is run on the emulated backend."""
    allocate = make_allocator(memory, seed)

    @cache
    def choose_from(first, func):
        for position in range(first, len(faults)):
            if strikes(faults[position], func):
                return partial(apply_fault, position, func)
        return partial(allocate, func) if is_allocating(func) else choose_computation(func)

    def apply_fault(position, func, args, kwargs):
        def inner(func, args, kwargs):
            return choose_from(position + 1, func)(args, kwargs)

        return faults[position].apply(func, args, kwargs, inner)

    def choose(func):
        compute = choose_from(0, func)

        def run(args, kwargs):
            result = compute(args, kwargs)
            if holds_double(result):
                check_float64(func, args, kwargs)
            return result

        return run

    return choose


def strikes(fault: Fault, func) -> bool:
    """Whether the fault rewrites this overload."""
    return str(func) in fault.ops or str(func.overloadpacket) in fault.ops


def check_float64(func, args, kwargs) -> None:
    """Raise if an op made float64 of anything but the host's own float64 tables."""
    tensors = [v for v in flatten((*args, *kwargs.values())) if isinstance(v, torch.Tensor)]
    has_table = any(holds_double(tensor) for tensor in tensors)
    if any(
        tensor.dim() and not holds_double(tensor) and (tensor.is_floating_point() or not has_table)
        for tensor in tensors
    ):
        raise make_float64_error(func)


def holds_double(result) -> bool:
    """Whether what an op returned is, or has in it, a tensor of a dtype that MPS lacks."""
    if isinstance(result, torch.Tensor):
        return result.dtype in DOUBLE_DTYPES
    return isinstance(result, (list, tuple)) and any(map(holds_double, result))


def make_float64_error(func) -> TypeError:
    """The error of a device without float64, naming the op and the way out."""
    return TypeError(
        f"{func}: float64 does not exist on the emulated MPS device, as it does not on MPS."
        " Use float32, or keep the tensor on the host."
    )


class RefuseFloat64Factories(TorchFunctionMode):
    """Refuses float64 from factories asked for it, which aten ops no longer tell from tables."""

    def __init__(self, emulation: Emulation):
        super().__init__()
        self.emulation = emulation

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        is_asked = kwargs.get("device") is not None or kwargs.get("dtype") in DOUBLE_DTYPES
        is_factory = is_asked and not any(map(torch.is_tensor, args[:1]))
        if is_factory and holds_double(result) and not self.emulation.shadows:
            raise make_float64_error(func)
        return result

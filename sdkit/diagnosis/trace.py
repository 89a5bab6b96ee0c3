"""Finds the first op whose inputs are finite and whose output is not, in one call of a component.

An op-level dispatch mode, entered inside every emulation, so that it sees what the model asked for
and what the backend answered. It costs a few times the call it watches; so the guard stays the only
thing that is always on, and only the call that the guard found bad is made again under this mode.

Three rules keep it honest:
- What an allocation returns is undefined, so an allocation is never a producer; an op that reads
  undefined memory, or a buffer that its contract tells it to ignore, is one.
- -inf that comes from -inf (or was written as a constant) is a mask, and no fault.
- Everything is judged on the CPU or outside the emulation, never by the backend under suspicion.
"""

import linecache
import sys
from bisect import bisect_right
from collections import deque
from contextlib import ExitStack, contextmanager
from pathlib import Path

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from sdkit.diagnosis.experiments import LOW_DTYPES, SOFTMAX_OPS, measure_flushed
from sdkit.diagnosis.op_record import BadOp, OpCall, summarize
from sdkit.diagnosis.op_traits import (
    find_ignored,
    name_arguments,
    name_options,
    name_tensors,
    read_traits,
)
from sdkit.emulate.mode import is_composite, suspended
from sdkit.finding import find_tensors

OPS_BEFORE = 12
FLUSHED_SHARE = 0.5
TORCH_FOLDER = str(Path(torch.__file__).parent)
OWN_FOLDER = str(Path(__file__).parent.parent)
FILLS = {"zeros": 0.0, "nan": float("nan")}


class _Found(BaseException):
    """Leaves the model from within an op; a BaseException, for models catch Exception."""


def find_first_bad_op(call, modules, *, look_for="bad", memory=None, outside_only=False):
    """Runs `call()` and returns the op that broke it.

    Args:
        call: A function without arguments, such as `lambda: pipe.unet(**kwargs)`.
        modules: {name: component} of those that take part, such as {"unet": pipe.unet}.
        look_for: "bad" stops at the first op that makes NaN or Inf. "swallowed" goes on from there
            and stops at the op that loses it again. "flushed" stops at the first op in float16 or
            bfloat16 that rounds most of its values to zero.
        memory: What fresh memory holds meanwhile: "zeros", "nan", or None for what the backend
            gives. On a real device this makes a fault that depends on memory certain, or heals it.
        outside_only: Look only at what runs in no module of these: guidance, scheduler, callbacks.

    Returns:
        A BadOp, or None if there was no such op.
    """
    trace = OpTrace(modules, look_for=look_for, memory=memory, outside_only=outside_only)
    try:
        with trace.installed(), torch.compiler.set_stance("force_eager"):
            call()
    except _Found:
        pass
    return trace.found


class OpTrace(TorchDispatchMode):
    """Looks at every op until one breaks; `installed()` also follows which module is running."""

    def __init__(self, modules, *, look_for="bad", memory=None, outside_only=False):
        super().__init__()
        self.modules = modules
        self.look_for = look_for
        self.memory = memory
        self.outside_only = outside_only
        self.found = None
        self.producer = None
        self.before = deque(maxlen=OPS_BEFORE)
        self.running = []  # paths of the modules that are running, innermost last
        self.changes = []  # (autograd sequence number, path that runs from there on), in order
        self.undefined = {}  # {storage: op that gave it out}
        self.weights = {}  # {storage: name}

    @contextmanager
    def installed(self):
        """Enters the mode and follows the modules; removes every trace of itself after."""
        with ExitStack() as undo:
            for root, component in self.modules.items():
                for name, module in component.named_modules():
                    self._follow(module, f"{root}.{name}".rstrip("."), undo)
                for kind in (component.named_parameters, component.named_buffers):
                    for name, tensor in kind():
                        self.weights[storage_of(tensor)] = f"{root}.{name}"
            undo.enter_context(self)
            yield self

    def _follow(self, module, path, undo):
        """First of the module's hooks on the way in, last on the way out: hooks are its too."""

        def enter(module, args):
            self.running.append(path)
            self.changes.append((torch._C._autograd._get_sequence_nr(), path))

        def leave(module, args, output):
            if self.running and self.running[-1] == path:
                self.running.pop()
            self.changes.append((torch._C._autograd._get_sequence_nr(), self.module))

        before = module.register_forward_pre_hook(enter, prepend=True)
        after = module.register_forward_hook(leave, always_call=True)
        undo.callback(before.remove)
        undo.callback(after.remove)

    @property
    def module(self):
        """Path of the innermost module that is running, in a backward that of its forward."""
        if self.running:
            return self.running[-1]
        node = torch._C._current_autograd_node()
        if node and self.changes:
            index = bisect_right(self.changes, node._sequence_nr(), key=lambda change: change[0])
            return self.changes[max(0, index - 1)][1]
        return next(iter(self.modules), "")

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if is_composite(func):  # under inference_mode these arrive whole
            with self:
                return func.decompose(*args, **kwargs)
        if self.outside_only and self.running:
            return func(*args, **kwargs)
        named = name_arguments(func, args, kwargs)
        ignored = find_ignored(func, named)
        args, kwargs, kept = keep_overwritten(func, args, kwargs, ignored)
        result = func(*args, **kwargs)
        with suspended():
            self._look(func, kept, result, ignored)
        return result

    def _look(self, func, kept, result, ignored):
        """Judges one op; `kept` are its (args, kwargs) as they were before it."""
        traits = read_traits(func)
        outputs = tuple(find_tensors(result))
        if traits.allocates:
            for tensor in outputs:
                self.undefined[storage_of(tensor)] = str(func)
                if self.memory:
                    tensor.fill_(FILLS[self.memory])
            return
        named = name_arguments(func, *kept)
        inputs = {n: t for n, t in name_tensors(named) if n.partition("[")[0] not in ignored}
        undefined = [n for n, t in name_tensors(named) if storage_of(t) in self.undefined]
        if not traits.is_view:
            self._judge(func, kept, named, inputs, outputs, ignored, undefined)
        self._mark_written(traits, named, outputs)
        self.before.append(f"{self.module}: {func}")

    def _judge(self, func, kept, named, inputs, outputs, ignored, undefined):
        if self.look_for == "flushed":
            self._look_for_flushing(func, kept, named, outputs, ignored, undefined)
            return
        bad_outputs = [tensor for tensor in outputs if is_bad(tensor, inputs, named)]
        if not bad_outputs:
            self._look_for_swallowing(func, inputs, outputs)
            return
        if self.producer:
            return
        bad = [name for name, tensor in inputs.items() if is_bad(tensor)]
        weights = [self.weights[storage_of(inputs[n])] for n in bad if self._is_weight(inputs[n])]
        inherited = [n for n in bad if not self._is_weight(inputs[n]) and n not in undefined]
        self.producer = self._describe(
            func, kept, named, outputs, ignored, undefined, tuple(weights), tuple(inherited)
        )
        if self.look_for == "bad":
            self.found = self.producer
            raise _Found

    def _look_for_swallowing(self, func, inputs, outputs):
        """After a first bad op: an op that takes NaN and makes only finite numbers has lost it."""
        if self.producer and outputs and any(is_bad(tensor) for tensor in inputs.values()):
            lost_in = f"{self.module}: {func}"
            self.found = BadOp(**{**vars(self.producer), "swallowed_by": lost_in})
            raise _Found

    def _look_for_flushing(self, func, kept, named, outputs, ignored, undefined):
        """Softmax is left out: that most of its values vanish is what it is for."""
        name = func._schema.name.partition("::")[2]
        if not outputs or outputs[0].dtype not in LOW_DTYPES or name in SOFTMAX_OPS:
            return
        if measure_flushed(named, func, outputs[0]) > FLUSHED_SHARE:
            self.found = self._describe(func, kept, named, outputs, ignored, undefined, (), ())
            raise _Found

    def _is_weight(self, tensor):
        return storage_of(tensor) in self.weights

    def _mark_written(self, traits, named, outputs):
        """Memory is defined once an op has made or filled it; a part of a buffer leaves it open."""
        if traits.is_view:
            return
        written = [t for n, t in name_tensors(named) if n.partition("[")[0] in traits.written]
        for tensor in (*written, *outputs):
            whole = tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size()
            if whole:
                self.undefined.pop(storage_of(tensor), None)

    def _describe(self, func, kept, named, outputs, ignored, undefined, weights, inherited):
        def note(name, tensor):
            notes = []
            if self._is_weight(tensor):
                notes.append(self.weights[storage_of(tensor)])
            if name in undefined:
                notes.append(f"uninitialised memory of {self.undefined[storage_of(tensor)]}")
            if name.partition("[")[0] in ignored:
                notes.append("ignored by contract")
            return ", ".join(notes)

        source, line = find_source()
        count = len(outputs)
        return BadOp(
            op=str(func),
            module=self.module,
            source=source,
            source_line=line,
            inputs=tuple(summarize(n, t, note(n, t)) for n, t in name_tensors(named)),
            outputs=tuple(
                summarize("output" if count == 1 else f"output[{i}]", tensor)
                for i, tensor in enumerate(outputs)
            ),
            options=name_options(named),
            before=tuple(self.before),
            bad_weights=weights,
            inherited=inherited,
            call=OpCall(func, *kept, outputs, tuple(ignored), tuple(undefined)),
        )


def keep_overwritten(func, args, kwargs, ignored):
    """Returns (args, kwargs) to run, and both as they are before: copies of what will be written.

    What the op writes without reading it is not copied: it says nothing about the result.
    """
    traits = read_traits(func)
    read_and_written = traits.written - ignored
    if not read_and_written:
        return args, kwargs, (args, kwargs)

    def keep(name, value):
        with suspended():
            if name not in read_and_written:
                return value
            if isinstance(value, torch.Tensor):
                return value.clone()
            return [v.clone() if isinstance(v, torch.Tensor) else v for v in value or ()]

    kept_args = tuple(keep(name, value) for name, value in zip(traits.names, args, strict=False))
    kept_kwargs = {name: keep(name, value) for name, value in kwargs.items()}
    return args, kwargs, (kept_args, kept_kwargs)


def is_bad(tensor, inputs=None, named=None) -> bool:
    """Whether a tensor holds NaN, +inf, or -inf that is no mask.

    Without `inputs` -inf counts as a mask. With them, the tensors and arguments of the op that made
    it, it is one if an input holds -inf, or if it was given as a number (`masked_fill(-inf)`).
    """
    if not tensor.is_floating_point():
        return False
    values = tensor.detach()
    if bool(values.isfinite().all()):
        return False
    values = values.cpu()
    if bool(values.isnan().any()) or bool((values == float("inf")).any()):
        return True
    if inputs is None:
        return False
    numbers = [v for v in named.values() if isinstance(v, float)]
    return float("-inf") not in numbers and not any(
        bool((t.detach().cpu() == float("-inf")).any())
        for t in inputs.values()
        if t.is_floating_point()
    )


def storage_of(tensor) -> int:
    """Identity of the memory behind a tensor, for as long as it lives."""
    return tensor.untyped_storage()._cdata


def find_source() -> tuple[str | None, str | None]:
    """("file.py:12 in function", the line) of the innermost frame outside torch and sdkit."""
    frame = sys._getframe(1)
    while frame:
        path = frame.f_code.co_filename
        if not path.startswith((TORCH_FOLDER, OWN_FOLDER, "<")) and "contextlib" not in path:
            line = linecache.getline(path, frame.f_lineno).strip()
            where = f"{Path(path).name}:{frame.f_lineno} in {frame.f_code.co_name}"
            return where, line
        frame = frame.f_back
    return None, None

"""Finds the first op whose inputs are finite and whose output is not, in one call of a component.

An op-level dispatch mode, entered inside every emulation, so that it sees what the model asked for
and what the backend answered. It costs a few times the call it watches; so the guard stays the only
thing that is always on, and only the call that the guard found bad is made again under this mode.

Five rules keep it honest:
- What an allocation returns is undefined, so an allocation is never a producer; an op that reads
  undefined memory, or a buffer that its contract tells it to ignore, is one.
- An Inf may be harmless: softmax and sigmoid end it. So the op that made it is only a suspect,
  until a NaN comes of it or it reaches the output. The first NaN ends the search.
- -inf that was written as a constant is a mask, and no suspect.
- Numbers are judged outside the emulation, and counted on copies on the CPU.
- Memory may change without an op: a hook writes through numpy, a kernel where it must not. What an
  op left finite and the next finds bad is put down to neither; a second run looks at the borders of
  the modules too, to tell in which of them it changed.
"""

from collections import deque
from contextlib import ExitStack, contextmanager
from dataclasses import replace

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from sdkit.diagnosis.experiments import SOFTMAX_OPS, measure_flushed
from sdkit.diagnosis.harmless import has_nan_in, is_constant, is_mask, rises
from sdkit.diagnosis.module_path import ModulePath, plain_path
from sdkit.diagnosis.op_record import BadOp, OpCall, keep_overwritten, summarize
from sdkit.diagnosis.op_traits import (
    find_ignored,
    find_written,
    name_arguments,
    name_options,
    name_tensors,
    read_traits,
)
from sdkit.diagnosis.source_line import find_source, name_hooks
from sdkit.diagnosis.storage import WeightNames, fills_storage, storage_of
from sdkit.emulate.float16 import HALVES
from sdkit.emulate.mode import is_composite, suspended
from sdkit.finding import find_tensors
from sdkit.validation import is_finite

OPS_BEFORE = 12
FLUSHED_SHARE = 0.5
# The last three make 0 of an Inf: so a norm whose sum of squares overflows puts out zeros.
CUTTING_OPS = frozenset(
    {
        "clamp", "clamp_min", "clamp_max", "hardtanh", "maximum", "minimum", "nan_to_num", "where",
        "div", "reciprocal", "rsqrt",
    }
)  # fmt: skip
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
    run_traced(trace, call)
    found = trace.found
    if found.changed_after if found else trace.is_result_bad:
        closer = OpTrace(modules, memory=memory, at_borders=True)
        run_traced(closer, call)
        if closer.found and closer.found.changed_after:
            return replace(closer.found, swallowed_by=found and found.swallowed_by)
    return found


def run_traced(trace, call):
    """Calls it under a trace until that has found what it looks for."""
    try:
        with trace.installed():
            torch.clear_autocast_cache()  # a weight cast before would arrive bad, without its cast
            result = call()
        if trace.look_for == "bad":
            with suspended():
                trace.look_at_result(result)
    except _Found:
        pass


class OpTrace(TorchDispatchMode):
    """Looks at every op until one breaks; `installed()` also follows which module is running."""

    def __init__(
        self, modules, *, look_for="bad", memory=None, outside_only=False, at_borders=False
    ):
        super().__init__()
        looks = {"on_enter": self._enter, "on_leave": self._look_at_border} if at_borders else {}
        self.path = ModulePath(modules, **looks)
        self.look_for = look_for
        self.memory = memory
        self.outside_only = outside_only
        self.found = None
        self.producer = self.latest_suspect = None
        self.is_result_bad = False
        self.before = deque(maxlen=OPS_BEFORE)
        self.undefined = {}  # {storage: op that gave it out}
        self.suspects = {}  # {storage that holds an Inf: the BadOp that made the Inf}
        self.finite = {}  # {storage, all of it seen written and finite: the op that wrote last}
        self.weights = WeightNames()
        self.held = []  # weak references: while one is held, no other storage gets that identity

    @contextmanager
    def installed(self):
        """Enters the mode and follows the modules; removes every trace of itself after."""
        with ExitStack() as undo:
            for root, component in self.path.modules.items():
                for kind in (component.named_parameters, component.named_buffers):
                    for name, tensor in kind():
                        self.weights.add(plain_path(f"{root}.{name}"), tensor)
            undo.enter_context(self.path.followed())
            undo.enter_context(self.path.methods_followed())
            undo.enter_context(self)
            yield self

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if is_composite(func):  # under inference_mode these arrive whole
            with self:
                return func.decompose(*args, **kwargs)
        if self.outside_only and (self.path.running or not self.path.has_denoised):
            return func(*args, **kwargs)
        named = name_arguments(func, args, kwargs)
        ignored = find_ignored(func, named)
        tensors = dict(name_tensors(named))
        places = {name: storage_of(tensor) for name, tensor in tensors.items()}
        weights = self.weights.find_all(tensors)
        kept = keep_overwritten(func, args, kwargs, ignored)
        result = func(*args, **kwargs)
        with suspended():
            undefined = tuple(name for name, place in places.items() if place in self.undefined)
            outputs = tuple(find_tensors(result)) or find_written(func, tensors)
            self._look(OpCall(func, *kept, outputs, tuple(ignored), undefined, places, weights))
        return result

    def _look(self, call):
        """Judges one op."""
        traits = read_traits(call.func)
        if traits.allocates:
            for tensor in call.output:
                self.undefined[storage_of(tensor)] = str(call.func)
                self.held.append(StorageWeakRef(tensor.untyped_storage()))
                if self.memory:
                    tensor.fill_(FILLS[self.memory])
            return
        if not traits.is_view:
            judge = self._judge_flushing if self.look_for == "flushed" else self._judge
            judge(call)
            self._mark_written(traits, call)
        self.before.append(f"{self._place}: {call.func}")

    def _judge(self, call):
        bad_outputs = [tensor for tensor in call.output if not is_finite(tensor)]
        if not bad_outputs:
            self._look_for_swallowing(call)
            self._note_finite(call)
            return
        bad = {name: tensor for name, tensor in call.inputs.items() if not is_finite(tensor)}
        dtype = bad_outputs[0].dtype
        if any(name not in call.weights for name in bad):
            call = self._learn_weights(call)
        blamed = {n: self.weights.find_bad(call.weights.get(n, ()), dtype) for n in bad}
        weights = tuple(name for names in blamed.values() for name in names)
        rest = [n for n in bad if not blamed[n] and n not in call.undefined]
        suspects = (self.suspects.get(call.places[n]) for n in bad if not blamed[n])
        made_by = next(filter(None, suspects), None)
        has_nan = any(map(has_nan_in, bad_outputs))
        came_with_it = (
            rest and not weights and not made_by and not any(map(rises, map(bad.get, rest)))
        )
        if not has_nan and (came_with_it or is_mask(call.named, bad_outputs)):
            return
        if weights or not made_by:
            arrived = tuple(name for name in rest if has_nan_in(bad[name]) or rises(bad[name]))
            changed = [bad[name] for name in arrived if call.places[name] in self.finite]
            made_by = (
                self._describe_change(changed[0], self.path.innermost)
                if changed and not weights
                else self._describe(call, weights, () if weights else arrived)
            )
        for tensor in bad_outputs:
            self.finite.pop(storage_of(tensor), None)
            self.suspects[storage_of(tensor)] = made_by
            self.held.append(StorageWeakRef(tensor.untyped_storage()))
        self.latest_suspect = made_by
        if weights or (has_nan and not is_constant(call.named)):
            self._accuse(made_by)

    def _learn_weights(self, call):
        """Offloaded weights are put in place while their module runs: those are not known yet."""
        path = self.path.innermost
        module = self.path.find(path) if self.path.running else None
        for kind in () if module is None else (module.named_parameters, module.named_buffers):
            for name, tensor in kind(recurse=False):
                if not tensor.is_meta and not self.weights.find(tensor):
                    self.weights.add(f"{path}.{name}", tensor)
        return replace(call, weights=self.weights.find_all(dict(name_tensors(call.named))))

    def _note_finite(self, call):
        """Remembers which memory holds nothing but what was seen to be finite."""
        for tensor in call.output:
            place = storage_of(tensor)
            if fills_storage(tensor):
                self.suspects.pop(place, None)
            if place in self.finite or (fills_storage(tensor) and not self.outside_only):
                self.finite[place] = f"{self._place}: {call.func}"
                self.held.append(StorageWeakRef(tensor.untyped_storage()))

    def _enter(self, path):
        """What goes into a module changed in the one that calls it, if it changed."""
        self._look_at_border(next(iter(self.path.running[-2:-1]), ""))

    def _look_at_border(self, module):
        """Whether a tensor that an op left finite has changed, where modules begin and end."""
        with suspended():
            for tensor in find_tensors(self.path.passing):
                if storage_of(tensor) in self.finite and (has_nan_in(tensor) or rises(tensor)):
                    self.found = self._describe_change(tensor, module)
                    raise _Found

    @property
    def _place(self):
        """Which module is running, in words."""
        return self.path.innermost or f"after {self.path.latest or 'nothing'}"

    def _accuse(self, made_by):
        """A NaN, or an Inf that reached the output, has its origin."""
        self.producer = self.producer or made_by
        if self.look_for == "bad":
            self.found = made_by
            raise _Found

    def look_at_result(self, result):
        """After the call: an Inf that is still there, though no NaN came of it."""
        for tensor in find_tensors(result):
            if is_finite(tensor):
                continue
            self.is_result_bad = True
            if self.latest_suspect:
                self._accuse(self.suspects.get(storage_of(tensor), self.latest_suspect))

    def _look_for_swallowing(self, call):
        """After a first NaN: an op that takes NaN and makes only finite numbers has lost it.

        An Inf that a clamp cuts off is lost as well; softmax and sigmoid may end one. So is what
        came without an op.
        """
        if self.look_for != "swallowed" or not call.output:
            return
        cuts = call.func._schema.name.partition("::")[2].rstrip("_") in CUTTING_OPS
        for name, tensor in call.inputs.items():
            made_by = self.suspects.get(call.places[name], self.producer)
            may_have_changed = cuts and call.places[name] in self.finite
            if not (made_by or may_have_changed) or is_finite(tensor):
                continue
            if may_have_changed:
                made_by = self._describe_change(tensor, self.path.innermost)
            if has_nan_in(tensor) or (cuts and call.places[name] in self.suspects):
                self.found = replace(made_by, swallowed_by=f"{self._place}: {call.func}")
                raise _Found

    def _judge_flushing(self, call):
        """Softmax is left out: that most of its values vanish is what it is for."""
        name = call.func._schema.name.partition("::")[2]
        if not call.output or call.output[0].dtype not in HALVES or name in SOFTMAX_OPS:
            return
        if measure_flushed(call) > FLUSHED_SHARE:
            self.found = self._describe(call)
            raise _Found

    def _mark_written(self, traits, call):
        """Memory is defined once an op has made or filled it; a part of a buffer leaves it open."""
        tensors = name_tensors(call.named)
        written = [(call.places[n], t) for n, t in tensors if n.partition("[")[0] in traits.written]
        for place, tensor in (*written, *((storage_of(t), t) for t in call.output)):
            if fills_storage(tensor):
                self.undefined.pop(place, None)

    def _describe(self, call, weights=(), inherited=()) -> BadOp:
        source, line = find_source()
        count = len(call.output)
        return BadOp(
            op=str(call.func),
            module=self.path.innermost,
            after="" if self.path.innermost else self.path.latest,
            source=source,
            source_line=line,
            inputs=tuple(
                summarize(
                    name,
                    tensor,
                    weights=self._name_weights(call, name),
                    allocated_by=self.undefined.get(call.places[name], ""),
                    is_ignored=name.partition("[")[0] in call.ignored,
                )
                for name, tensor in name_tensors(call.named)
            ),
            outputs=tuple(
                summarize("output" if count == 1 else f"output[{i}]", tensor)
                for i, tensor in enumerate(call.output)
            ),
            options=name_options(call.named),
            before=tuple(self.before),
            bad_weights=weights,
            inherited=inherited,
            call=call,
        )

    def _describe_change(self, tensor, module) -> BadOp:
        """Memory that an op left finite and that is not finite any more."""
        return BadOp(
            op=None,
            module=module,
            source=None,
            source_line=None,
            inputs=(),
            outputs=(summarize("changed", tensor),),
            options={},
            before=tuple(self.before),
            changed_after=self.finite[storage_of(tensor)],
            hooks=name_hooks(self.path.find(module)) if module else (),
        )

    def _name_weights(self, call, name) -> tuple[str, ...]:
        """The weights that an argument is; of many in one buffer the bad ones, if there are any."""
        names = call.weights.get(name, ())
        bad = len(names) > 1 and self.weights.find_bad(names, call.output[0].dtype)
        return bad or names

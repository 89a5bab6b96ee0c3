"""Redoes in float32 the one component call that came out bad, before the scheduler has used it.

A forward hook on the UNet sees its output before `scheduler.step`, so nothing has to be rewound:
only that call is made again with the component lifted, and the run goes on in reduced precision.
A component that fails again and again is switched over for the rest of the run.
"""

import time
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from functools import partial

from sdkit.device import synchronize
from sdkit.finding import find_tensors
from sdkit.guarding import find_components
from sdkit.hooks import after_forward, after_method
from sdkit.loading.lifting import computing, holds_low
from sdkit.validation import count_nonfinite, is_finite

SWITCH_AFTER = 3  # rescues in a row: the fault is in every call, and trying float16 first is waste


@dataclass(frozen=True)
class Rescue:
    """One component call that was made again.

    Attributes:
        component: As in `Finding`: "unet", "text_encoder", "vae.decode".
        call: Index among the calls of this component in the pipeline call; of a UNet that is
            called once a step, the step.
        nan_count: NaN values that the call had made.
        inf_count: Infinite values that the call had made.
        rescued: Whether float32 made it finite.
        seconds: What the second call took; None under emulation.
    """

    component: str
    call: int
    nan_count: int
    inf_count: int
    rescued: bool
    seconds: float | None


@dataclass
class RescueLog:
    """What was rescued so far.

    Attributes:
        rescues: In order.
        calls: Number of calls of each component.
        switched_over: {component: index of the rescue after which it stayed in float32}.
    """

    rescues: list[Rescue] = field(default_factory=list)
    calls: dict[str, int] = field(default_factory=dict)
    switched_over: dict[str, int] = field(default_factory=dict)

    def to_dict(self) -> dict:
        """As JSON types, for a record."""
        return {
            "rescues": [asdict(rescue) for rescue in self.rescues],
            "calls": dict(self.calls),
            "switched_over": dict(self.switched_over),
        }


class Rescuer:
    """Stands behind every component of a pipeline while `installed()`."""

    def __init__(self, pipe, *, is_emulated):
        """Prepares a log; nothing is changed yet."""
        self.pipe = pipe
        self.is_emulated = is_emulated
        self.log = RescueLog()
        self._in_this_call = {}
        self._in_a_row = {}

    def begin_pipeline_call(self):
        """The calls of components are counted anew."""
        self._in_this_call = {}

    @contextmanager
    def installed(self):
        """Rescues until the block ends, then undoes every hook and every switch."""
        with ExitStack() as undo:
            self._undo = undo
            for name, component in find_components(self.pipe).items():
                if name == "vae":
                    component = getattr(component, "_orig_mod", component)  # under torch.compile
                    for method in ("encode", "decode"):
                        function, parts = getattr(component, method), list(component.children())
                        look = partial(self._look, f"vae.{method}", parts, function)
                        after_method(component, method, look, undo)
                else:
                    forward = partial(call_forward, component)
                    after_forward(component, partial(self._look, name, [component], forward), undo)
            yield self.log

    def _look(self, component, modules, function, args, kwargs, output):
        """Returns what the call gives in float32 if it was bad and that helps, else None."""
        index = self._in_this_call.get(component, 0)
        self._in_this_call[component] = index + 1
        self.log.calls[component] = self.log.calls.get(component, 0) + 1
        bad = [tensor for tensor in find_tensors(output) if not is_finite(tensor)]
        if not bad:
            self._in_a_row[component] = 0
            return None
        came_bad = any(not is_finite(t) for t in find_tensors([args, kwargs]))
        if came_bad or not any(map(holds_low, modules)):
            return None
        again, seconds = self._redo(modules, function, args, kwargs)
        rescued = all(is_finite(tensor) for tensor in find_tensors(again))
        counts = [count_nonfinite(tensor) for tensor in bad]
        nan_count, inf_count = (sum(column) for column in zip(*counts, strict=True))
        rescue = Rescue(component, index, nan_count, inf_count, rescued, seconds)
        self.log.rescues.append(rescue)
        if not rescued:
            return None
        self._count_in_a_row(component, modules)
        return again

    def _redo(self, modules, function, args, kwargs):
        device = self.pipe._execution_device
        synchronize(device)
        started = time.perf_counter()
        with computing(modules):
            again = function(*args, **kwargs)
        synchronize(device)
        return again, None if self.is_emulated else time.perf_counter() - started

    def _count_in_a_row(self, component, modules):
        """Switches a component over that fails again and again."""
        self._in_a_row[component] = self._in_a_row.get(component, 0) + 1
        if self._in_a_row[component] == SWITCH_AFTER:
            self._undo.enter_context(computing(modules))
            self.log.switched_over[component] = len(self.log.rescues) - 1


def call_forward(module, *args, **kwargs):
    """Calls what `forward` is now: while the module is lifted, another than before."""
    return module.forward(*args, **kwargs)

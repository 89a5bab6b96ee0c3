"""Names the first module of a run with a non-finite output, for faults that do not come again.

One flag a module call stays on the device until a guard fires: no synchronisation, no cost an op.
"""

from collections import defaultdict
from contextlib import ExitStack, contextmanager

import torch

from sdkit.emulate.mode import suspended
from sdkit.finding import find_tensors
from sdkit.guarding import find_components
from sdkit.hooks import is_compiled


class ModuleWatch:
    """Remembers, for the component call that is running, whether each module's output is finite."""

    def __init__(self):
        self.flags = []  # (path, tensor that is True if the output is finite), in order
        self.calls = []  # of the component calls before: whether all their outputs were finite

    @contextmanager
    def installed(self, modules):
        """Watches {name: component}; removes every hook after."""
        with ExitStack() as undo:
            for root, component in modules.items():
                before = component.register_forward_pre_hook(lambda *_: self._begin_call())
                undo.callback(before.remove)
                for name, module in [] if is_compiled(component) else component.named_modules():
                    look = self._look(f"{root}.{name}".rstrip("."))
                    # A hook of somebody else's may mend or spoil what the module itself put out.
                    for first in {bool(module._forward_hooks), False}:
                        handle = module.register_forward_hook(look, prepend=first)
                        undo.callback(handle.remove)
            yield self

    def _begin_call(self):
        """Makes one flag a device of those of the call before."""
        with suspended():
            by_device = defaultdict(list)
            for _, flag in self.flags:
                by_device[flag.device].append(flag)
            self.calls += [torch.stack(flags).all() for flags in by_device.values()]
        self.flags.clear()

    @property
    def has_seen_bad(self) -> bool:
        """Whether any module of any call had a non-finite output."""
        self._begin_call()
        return not all(map(bool, self.calls))

    def _look(self, path):
        def look(module, args, output):
            with suspended():
                self.flags += [(path, t.isfinite().all()) for t in find_tensors(output)]

        return look

    def find_first_bad(self, root) -> str | None:
        """Path of the first module of a component with a non-finite output, inner ones first."""
        flags = (flag for flag in self.flags if flag[0].partition(".")[0] == root)
        return next((path for path, is_finite in flags if not bool(is_finite)), None)


@contextmanager
def uncompiled(pipe):
    """Yields the names of compiled components, and lets the body run them in eager mode."""
    compiled = {name: c for name, c in find_components(pipe).items() if is_compiled(c)}
    with ExitStack() as undo:
        for name, component in compiled.items():
            undo.callback(setattr, pipe, name, component)
            setattr(pipe, name, getattr(component, "_orig_mod", component))
            for module in component.modules():
                undo.callback(setattr, module, "_compiled_call_impl", module._compiled_call_impl)
                module._compiled_call_impl = None
        yield set(compiled)

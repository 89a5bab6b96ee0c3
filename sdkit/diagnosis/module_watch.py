"""Names the first module of a run with a non-finite output, for faults that do not come again.

One flag a module call stays on the device until a guard fires: no synchronisation, no cost an op.
"""

from contextlib import ExitStack, contextmanager

from sdkit.emulate.mode import suspended
from sdkit.finding import find_tensors


class ModuleWatch:
    """Remembers, for the component call that is running, whether each module's output is finite."""

    def __init__(self):
        self.flags = []  # (path, tensor that is True if the output is finite), in order

    @contextmanager
    def installed(self, modules):
        """Watches {name: component}; removes every hook after."""
        with ExitStack() as undo:
            for root, component in modules.items():
                before = component.register_forward_pre_hook(lambda *_: self.flags.clear())
                undo.callback(before.remove)
                for name, module in component.named_modules():
                    handle = module.register_forward_hook(self._look(f"{root}.{name}".rstrip(".")))
                    undo.callback(handle.remove)
            yield self

    def _look(self, path):
        def look(module, args, output):
            with suspended():
                self.flags += [(path, t.isfinite().all()) for t in find_tensors(output)]

        return look

    def find_first_bad(self) -> str | None:
        """Path of the first module whose output held NaN or Inf; inner ones come first."""
        return next((path for path, is_finite in self.flags if not bool(is_finite)), None)

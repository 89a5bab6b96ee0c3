"""Which module is running now: its dotted path from the pipeline, also during a backward."""

from bisect import bisect_right
from contextlib import ExitStack, contextmanager

import torch

from sdkit.guarding import DENOISERS


class ModulePath:
    """Follows the modules of some components while `followed()`.

    Attributes:
        modules: {name: component} of those that are followed.
        running: Paths of the modules that are running, innermost last.
        passing: While `on_enter` or `on_leave` is called, what goes into or comes out of it.
        latest: Name of the component that was called last; "" before the first call.
        has_denoised: Whether a UNet or transformer was called yet.
    """

    def __init__(self, modules, *, on_enter=None, on_leave=None):
        """Takes {name: component}, and functions of a path called on the way in and out."""
        self.modules = modules
        self.on_enter, self.on_leave = on_enter, on_leave
        self.running = []
        self.passing = None
        self.latest = ""
        self.has_denoised = False
        self.changes = []  # (autograd sequence number, path that runs from there on), in order

    @contextmanager
    def followed(self):
        """Puts hooks on every module, and removes them after."""
        with ExitStack() as undo:
            for root, component in self.modules.items():
                for name, module in component.named_modules():
                    self._follow(module, plain_path(f"{root}.{name}"), undo)
            yield self

    @contextmanager
    def methods_followed(self):
        """Follows `encode` and `decode` of a VAE too, which fire no hook."""
        with ExitStack() as undo:
            for root, component in self.modules.items():
                for method in ("encode", "decode"):
                    if hasattr(component, method):
                        self._follow_method(component, method, root, undo)
            yield self

    def _follow(self, module, path, undo):
        """First of the module's hooks on the way in, last on the way out: hooks are its too."""

        def enter(module, args, kwargs):
            self.latest = path.partition(".")[0]
            self.has_denoised |= self.latest.startswith(DENOISERS)
            self.running.append(path)
            self.changes.append((torch._C._autograd._get_sequence_nr(), path))
            if self.on_enter:
                self.passing = (args, kwargs)
                self.on_enter(path)
                self.passing = None

        def leave(module, args, output):
            if self.running and self.running[-1] == path:
                self.running.pop()
            self.changes.append((torch._C._autograd._get_sequence_nr(), self.innermost))
            if self.on_leave:
                self.passing = output
                self.on_leave(path)
                self.passing = None

        before = module.register_forward_pre_hook(enter, prepend=True, with_kwargs=True)
        after = module.register_forward_hook(leave, always_call=True)
        undo.callback(before.remove)
        undo.callback(after.remove)

    def _follow_method(self, component, method, root, undo):
        """Puts down to the component itself what the code of one of its methods runs."""
        own = vars(component).get(method)
        inner = getattr(component, method)

        def call(*args, **kwargs):
            depth, self.latest = len(self.running), root
            self.running.append(root)
            try:
                return inner(*args, **kwargs)
            finally:
                del self.running[depth:]

        setattr(component, method, call)
        undo.callback(setattr, component, method, own) if own else undo.callback(
            delattr, component, method
        )

    def find(self, path) -> torch.nn.Module:
        """The module at a path."""
        root, _, rest = path.partition(".")
        component = self.modules[root]
        return getattr(component, "_orig_mod", component).get_submodule(rest)

    @property
    def innermost(self):
        """Path of the innermost module that is running, in a backward that of its forward.

        "" where none is: in the pipeline's own code, the scheduler, a callback, a loss.
        """
        if self.running:
            return self.running[-1]
        node = torch._C._current_autograd_node()
        if node and self.changes:
            index = bisect_right(self.changes, node._sequence_nr(), key=lambda change: change[0])
            return self.changes[max(0, index - 1)][1]
        return ""


def plain_path(path: str) -> str:
    """A dotted path without what torch.compile puts into it."""
    return path.rstrip(".").replace("._orig_mod", "")

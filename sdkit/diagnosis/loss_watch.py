"""Sees NaN or Inf go into a function that may lose it, within a module, where no border shows it.

Only such functions are looked at. A flag a tensor stays on the device until it is asked.
"""

from contextlib import ExitStack, contextmanager

from torch.overrides import TorchFunctionMode

from sdkit.emulate.mode import suspended
from sdkit.finding import find_tensors
from sdkit.hooks import is_compiled

INFINITY = float("inf")
LOSING = frozenset(
    name + ending
    for name in (
        "nan_to_num", "clamp", "clip", "clamp_min", "clamp_max", "hardtanh", "relu6", "where",
        "masked_fill", "masked_scatter", "index_fill", "index_put", "maximum", "minimum", "fmax",
        "fmin", "max", "min", "amax", "amin", "nansum", "nanmean", "scaled_dot_product_attention",
        "__setitem__",
    )
    for ending in ("", "_")
)  # fmt: skip


class LossWatch(TorchFunctionMode):
    """Looks at what such functions are given while a component runs."""

    def __init__(self):
        super().__init__()
        self.depth = 0  # of components: the tables of schedulers, outside, hold Inf that is meant
        self.flags = []  # tensors, True if nothing was NaN or +Inf; -Inf alone is a mask

    @contextmanager
    def installed(self, modules):
        """Watches {name: component}; not through a compiled one, which would be traced anew."""
        if any(map(is_compiled, modules.values())):
            yield self
            return
        with ExitStack() as undo:
            for component in modules.values():
                # decode() and encode() are no forward(): of a VAE the parts are called.
                is_vae = hasattr(component, "decode")
                for part in component.children() if is_vae else [component]:
                    enter = part.register_forward_pre_hook(lambda *_: self._step(1))
                    leave = part.register_forward_hook(lambda *_: self._step(-1), always_call=True)
                    undo.callback(enter.remove)
                    undo.callback(leave.remove)
            undo.enter_context(self)
            yield self

    def _step(self, by):
        self.depth += by

    @property
    def has_seen_bad(self) -> bool:
        """Whether NaN or +Inf went into any such function."""
        with suspended():
            return not all(map(bool, self.flags))

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if self.depth and getattr(func, "__name__", None) in LOSING:
            with suspended():
                self.flags += [(t < INFINITY).all() for t in find_tensors([args, kwargs])]
        return func(*args, **kwargs)

"""Looks at the calls of a module or a method: also where it is compiled, or fires no hook."""

from functools import wraps
from types import MethodType


def is_compiled(component) -> bool:
    """Whether `torch.compile` or `module.compile` is on a component or within it.

    A hook inside would be traced into the graph, or refused by fullgraph.
    """
    return any(
        module._compiled_call_impl is not None or type(module).__name__ == "OptimizedModule"
        for module in component.modules()
    )


def after_forward(module, look, undo):
    """Calls look(args, kwargs, output) after each call of a module, until `undo` is closed.

    What it returns, if anything, takes the place of the output, as with a forward hook.
    """
    # A hook would be traced into what `module.compile()` made: recompiled, or refused by fullgraph.
    compiled = module._compiled_call_impl
    if compiled is None:
        handle = module.register_forward_hook(
            lambda _, args, kwargs, output: look(args, kwargs, output), with_kwargs=True
        )
        undo.callback(handle.remove)
        return

    def call(*args, **kwargs):
        output = compiled(*args, **kwargs)
        replacement = look(args, kwargs, output)
        return output if replacement is None else replacement

    module._compiled_call_impl = call
    undo.callback(setattr, module, "_compiled_call_impl", compiled)


def after_method(owner, method, look, undo):
    """The same for `vae.encode`, `vae.decode` or `scheduler.step`, which fire no hook.

    Hooks on a VAE's inner encoder and decoder would see single slices and tiles, would miss the
    convolutions beside them, and would be lost where the user compiled `vae.decode`.
    """
    own = vars(owner).get(method)  # a compiled method, or another guard's
    original = getattr(type(owner), method)

    @wraps(own or original)  # pipelines ask a scheduler's step for its parameters
    def call(owner, *args, **kwargs):
        output = own(*args, **kwargs) if own else original(owner, *args, **kwargs)
        replacement = look(args, kwargs, output)
        return output if replacement is None else replacement

    setattr(owner, method, MethodType(call, owner))  # bound: a deep copy calls its own weights
    undo.callback(setattr, owner, method, own) if own else undo.callback(delattr, owner, method)

"""Which models a pipeline holds, and where a dotted path leads."""

import torch

from sdkit.validation import ValidationError


def find_models(pipe) -> dict[str, torch.nn.Module]:
    """{name: component} of a pipeline's models."""
    return {
        name: component
        for name, component in pipe.components.items()
        if isinstance(component, torch.nn.Module)
    }


def find_module(pipe, path: str) -> torch.nn.Module:
    """The module at a dotted path from the pipeline, through what torch.compile wraps.

    Raises:
        ValidationError: There is none.
    """
    root, _, rest = path.partition(".")
    try:
        component = find_models(pipe)[root]
        return getattr(component, "_orig_mod", component).get_submodule(rest)
    except (KeyError, AttributeError) as error:
        raise ValidationError(f"{path}: no module of this {type(pipe).__name__}.") from error

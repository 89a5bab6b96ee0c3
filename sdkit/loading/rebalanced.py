"""A rebalanced model in use: its eps restored on loading, and what is added to it later watched.

What is added was made for the model as it was before, so it is scaled, or refused:

- A ControlNet's residuals are multiplied by their streams' powers of two: exact.
- LoRA on a layer that was moved, an IP-Adapter, a T2I-Adapter: refused, before anything is drawn.
- AnimateDiff, ControlNet-XS and ControlNets made from a UNet copy its weights part by part into
  norms with the eps of their code: refused, when they begin to.
- Textual inversion adds tokens to the text encoder, which is never rebalanced: right as it is.
"""

from inspect import signature
from pathlib import Path
from types import MethodType

import torch
from diffusers import UNet2DConditionModel

from sdkit.loading.modules import find_models
from sdkit.loading.sidecar import MARK, SIDECAR_NAME, find_shift, read_sidecar, save_sidecar
from sdkit.validation import ValidationError


def apply_sidecars(pipe, folder) -> list[str]:
    """Restores the eps of each rebalanced component of a pipeline that was loaded from a folder.

    Returns:
        A sentence for each.
    """
    found = [apply_sidecar(model, Path(folder) / name) for name, model in find_models(pipe).items()]
    return [sentence for sentence in found if sentence]


def apply_sidecar(model, folder) -> str | None:
    """Restores the eps of a rebalanced model that was loaded from a folder.

    Args:
        model: As diffusers loaded it, in any dtype.
        folder: Where it was loaded from.

    Returns:
        A sentence for the report, or None if there is no sidecar.

    Raises:
        ValidationError: The sidecar is damaged, or belongs to another model.
    """
    path = Path(folder) / SIDECAR_NAME
    if not path.is_file():
        return None
    shift = read_sidecar(model, path)
    for name, eps in shift.eps.items():
        model.get_submodule(name).eps = eps
    install_checks(model, shift)
    return f"{path.parent.name}: rebalanced by sdkit, the eps of {len(shift.eps)} norms restored"


def install_checks(model, shift):
    """Marks a model as shifted and watches what is added to it; a second call replaces the first.

    From here on `model.save_pretrained`, and that of its pipeline, writes the sidecar too.
    """
    remove_checks(model)
    setattr(model, MARK, shift)
    model.save_pretrained = MethodType(save_with_sidecar, model)  # bound: a copy saves itself
    if isinstance(model, UNet2DConditionModel):
        model.register_forward_pre_hook(check_call, with_kwargs=True)
        model.time_embedding.register_state_dict_pre_hook(refuse_rebuilding)
        for function in (add_adapter, load_lora_adapter, fuse_lora):
            setattr(model, function.__name__, MethodType(function, model))


def remove_checks(model):
    """Takes the mark and the checks off again."""
    # By the function itself: a copy of a model has the hook, but a handle that removes nothing.
    for key, hook in list(model._forward_pre_hooks.items()):
        if hook is check_call:
            del model._forward_pre_hooks[key], model._forward_pre_hooks_with_kwargs[key]
    hooks = getattr(model, "time_embedding", model)._state_dict_pre_hooks
    for key in [key for key, hook in hooks.items() if hook is refuse_rebuilding]:
        del hooks[key]
    for name in (MARK, "save_pretrained", "add_adapter", "load_lora_adapter", "fuse_lora"):
        vars(model).pop(name, None)


def save_with_sidecar(model, save_directory, *args, **kwargs):
    """`save_pretrained`, and the sidecar."""
    type(model).save_pretrained(model, save_directory, *args, **kwargs)
    save_sidecar(model, save_directory)


def add_adapter(model, *args, **kwargs):
    """The library's own, but an adapter that cannot act rightly is taken off again."""
    type(model).add_adapter(model, *args, **kwargs)
    take_off_refused(model)


def load_lora_adapter(model, *args, **kwargs):
    """The library's own, but an adapter that cannot act rightly is taken off again."""
    type(model).load_lora_adapter(model, *args, **kwargs)
    take_off_refused(model)


def fuse_lora(model, *args, **kwargs):
    """The library's own, but not of what came in another way and cannot act rightly."""
    take_off_refused(model)
    type(model).fuse_lora(model, *args, **kwargs)


def take_off_refused(model):
    """Here, for fusing would hide an adapter before the next call could see it."""
    try:
        check_additions(model)
    except ValidationError:
        model.unload_lora()
        raise


def check_call(model, args, kwargs):
    """A forward pre-hook that scales what it can and refuses the rest."""
    check_additions(model)
    names = list(signature(type(model).forward).parameters)[1:]
    named = kwargs | dict(zip(names[2:], args[2:], strict=False))  # residuals may come unnamed
    return args[:2], scale_residuals(named, find_shift(model))


def check_additions(model):
    """Refuses adapters on layers whose weights moved, and processors that add to a moved stream."""
    for path in find_shift(model).largest:
        module = model.get_submodule(path)
        if hasattr(module, "base_layer"):
            refuse(f"{path} has an adapter ({type(module).__name__})")
        if path.endswith(".to_v"):
            processor = model.get_submodule(path.removesuffix(".to_v")).processor
            if isinstance(processor, torch.nn.Module):
                refuse(f"{path} has a {type(processor).__name__} beside it")


def refuse_rebuilding(module, prefix, keep_vars):
    """A state dict of the whole model has a prefix here; who asks for the part alone copies it."""
    if not prefix:
        raise ValidationError(
            "unet: its weights are copied part by part into another model, which gives its norms "
            "the eps of its code, but sdkit has rebalanced this one, and it needs its own. Make "
            "the other model (AnimateDiff, ControlNet-XS, a ControlNet) from the original UNet."
        )


def scale_residuals(kwargs, shift):
    """A ControlNet's residuals, each on the stream that it is added to."""
    down = kwargs.get("down_block_additional_residuals")
    middle = kwargs.get("mid_block_additional_residual")
    inner = kwargs.get("down_intrablock_additional_residuals")
    if not any((*shift.skips, shift.middle)) or (down is None and inner is None):
        return kwargs
    if inner is not None or middle is None:
        refuse("a T2I-Adapter adds to its residual streams")
    scaled = [value * 2.0**e for value, e in zip(down, shift.skips, strict=True)]
    return {
        **kwargs,
        "down_block_additional_residuals": tuple(scaled),
        "mid_block_additional_residual": middle * 2.0**shift.middle,
    }


def refuse(seen):
    raise ValidationError(
        f"unet: {seen}, but sdkit has rebalanced this model, and what was made for the original "
        "would act with another strength. Load the original model, add it there (a LoRA with "
        "`pipe.fuse_lora(); pipe.unload_lora_weights()`), and rebalance then."
    )

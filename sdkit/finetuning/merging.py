"""An adapter added to the weights themselves, and taken out again; both are checked finite."""

from sdkit.generation.request import check_number
from sdkit.validation import ValidationError, is_finite


def merge_adapter(pipe, *, scale=1.0):
    """Adds the loaded adapter to the weights themselves, which then take no time of their own.

    Args:
        pipe: A pipeline with an adapter, changed in place.
        scale: How much of it.

    Returns:
        The pipeline.

    Raises:
        ValidationError: There is no adapter, or a merged weight would be NaN or Inf, as float16
            can make it; what was merged before it is taken out again.
    """
    check_number("scale", scale, kind=float)
    adapted = _find_adapted(pipe)
    try:
        pipe.fuse_lora(components=adapted, lora_scale=scale, safe_fusing=True)
    except ValueError as error:
        pipe.unfuse_lora(components=adapted)
        raise ValidationError(
            f"merge: {error} Expected finite weights. Merge in float32, or with a smaller scale."
        ) from error
    return _check_weights(pipe, "merge")


def unmerge_adapter(pipe):
    """Takes a merged adapter out again; the weights come back but for rounding.

    Returns:
        The pipeline.

    Raises:
        ValidationError: There is no adapter, or a weight is NaN or Inf afterwards.
    """
    pipe.unfuse_lora(components=_find_adapted(pipe))
    return _check_weights(pipe, "unmerge")


def _find_adapted(pipe):
    names = ("unet", "text_encoder")
    found = [name for name in names if getattr(getattr(pipe, name, None), "peft_config", None)]
    if not found:
        raise ValidationError(
            f"{type(pipe).__name__}: has no adapter. Expected one on its {' or '.join(names)}: "
            "sdkit.finetuning.load_adapter(pipe, path)."
        )
    return found


def _check_weights(pipe, where):
    for name in _find_adapted(pipe):
        for key, parameter in getattr(pipe, name).named_parameters():
            if not is_finite(parameter):
                raise ValidationError(
                    f"{where}: {name}.{key} holds NaN or Inf. Expected finite weights. Load the "
                    "pipeline again."
                )
    return pipe

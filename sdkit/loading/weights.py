"""Checks of what was loaded: each weight in the dtype and on the device asked for, and finite."""

import torch

from sdkit.loading.dtype_policy import dtype_name
from sdkit.validation import ValidationError, count_nonfinite, is_finite


def check_components(pipe, dtypes, device):
    """Checks dtype and device of every parameter and stored buffer against what was asked.

    Args:
        pipe: The loaded pipeline.
        dtypes: {component: torch.dtype}.
        device: The torch.device.

    Returns:
        A notice for each component of which some weights stay float32, as its class demands.

    Raises:
        ValidationError: A tensor is of another dtype or elsewhere.
    """
    notices = []
    for name, dtype in dtypes.items():
        module = getattr(pipe, name)
        kept = tuple(getattr(module, "_keep_in_fp32_modules", None) or ())
        kept_count = 0
        for key, tensor in named_weights(module):
            if tensor.device.type != device.type:
                raise ValidationError(
                    f"{name}.{key}: is on {tensor.device}, expected {device} after loading."
                )
            if tensor.is_floating_point() and tensor.dtype != dtype:
                if tensor.dtype != torch.float32 or not any(part in key for part in kept):
                    raise ValidationError(
                        f"{name}.{key}: is {dtype_name(tensor.dtype)}, expected "
                        f"{dtype_name(dtype)} after loading. Its own file may be of another dtype."
                    )
                kept_count += 1
        if kept_count:
            notices.append(f"{name}: {kept_count} tensors stay float32, as its class demands")
    return notices


def named_weights(module):
    """Yields parameters and saved buffers by name; other buffers have their class's own dtype."""
    saved = module.state_dict(keep_vars=True)
    for key, tensor in [*module.named_parameters(), *module.named_buffers()]:
        if key in saved:
            yield key, tensor


def check_weights(pipe, components, load_again):
    """Checks that all weights are finite; a bad one is named.

    Args:
        pipe: The loaded pipeline.
        components: Names of its parts that have weights.
        load_again: Called with nothing when one is bad; returns the pipeline in float32, to tell
            whether the file or the cast did it.

    Raises:
        ValidationError: A weight is NaN or Inf.
    """
    for name in components:
        for key, tensor in named_weights(getattr(pipe, name)):
            if is_finite(tensor):
                continue
            nan_count, inf_count = count_nonfinite(tensor)
            stored = dict(named_weights(getattr(load_again(), name)))[key]
            raise ValidationError(
                f"{name}.{key} ({dtype_name(tensor.dtype)}, {tensor.device.type}): {nan_count} of "
                f"{tensor.numel()} values are NaN, {inf_count} are Inf. "
                f"{_explain_weight(name, tensor, stored)}"
            )


def _explain_weight(name, tensor, stored):
    if not is_finite(stored):
        return "They are so in the file. Copy or download the model again, or ask its author."
    largest, limit = stored.abs().max().item(), torch.finfo(tensor.dtype).max
    if largest > limit:
        return (
            f"The file is sound, but its largest value there, {largest:.6g}, overflows in the cast "
            f"to {dtype_name(tensor.dtype)}, which ends at {limit:.6g}. "
            f'Load with dtype={{"{name}": "float32"}}.'
        )
    return (
        'The file is sound, the copy on the device is not. Try backend="cpu", and see '
        "notebooks/01_diagnose_black_images.ipynb."
    )


def count_weight_bytes(module):
    """Returns the bytes of a module's parameters and buffers."""
    tensors = [*module.parameters(), *module.buffers()]
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)

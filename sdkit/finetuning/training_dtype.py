"""In which dtype the frozen weights compute, and where that is refused."""

import torch

from sdkit.device import find_device_problem
from sdkit.finetuning.config import LoRAConfig
from sdkit.validation import ValidationError

DTYPES = {"no": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def choose_training_dtype(config: LoRAConfig, device, *, device_type=None, device_name="") -> tuple:
    """Returns the dtype of the frozen weights, and what to say about it.

    The adapter, its gradients and the loss are float32 in any case.

    Args:
        config: Its `mixed_precision` and `force_mixed_precision`.
        device: Where the training runs.
        device_type: "mps" for an emulated one; None is the device's own.
        device_name: The card's name on CUDA.

    Returns:
        (torch.dtype, cautions).

    Raises:
        ValidationError: The device is not fit for it.
    """
    dtype = DTYPES[config.mixed_precision]
    if config.mixed_precision == "no":
        return dtype, []
    where = f"mixed_precision={config.mixed_precision} on {device}"
    problem = find_device_problem(device, dtype)
    if problem:
        raise ValidationError(f"{where}: {problem}. Expected a device that has it. Use no.")
    unfit = _find_unfit(config.mixed_precision, device_type or device.type, device_name)
    if unfit and not config.force_mixed_precision:
        raise ValidationError(
            f'{where}: {unfit}. Expected mixed_precision="no" there; force_mixed_precision=true '
            "overrides this."
        )
    return dtype, [f"{where}, forced: {unfit}"] if unfit else []


def _find_unfit(mixed_precision, device_type, device_name):
    """Why a device is not fit for it, in a few words, or None."""
    if device_type == "mps":
        return (
            "reduced precision is where MPS gives NaN (notebooks/01_diagnose_black_images.ipynb), "
            "and its backward pass is less tried than its forward"
        )
    if device_type == "cpu" and mixed_precision == "fp16":
        return "float16 on a CPU is far slower than float32 and no more exact"
    if mixed_precision == "fp16" and "GTX 16" in device_name:
        return f"{device_name} gives NaN in float16 (pytorch#58123)"
    return None

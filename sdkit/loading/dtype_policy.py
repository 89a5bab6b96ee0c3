"""Which dtype each component gets, and why: the policy is a function of plain values.

The reasons turn on MPS: float16 overflows or reads stale memory there, float32 takes the room.
"""

import torch

from sdkit.validation import ValidationError

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
# Where activations are not known: the report measured 6-8 GB in use for 4-5 GB of float32 weights
# (512x512 pixels, one image).
MEMORY_PER_WEIGHT = 1.6
MARGIN = 1.1  # a prediction is held to 10 % (tests/test_memory.py)


class PrecisionWarning(UserWarning):
    """A dtype is used that is known to give NaN or black images on this device."""


def choose_dtypes(
    device_type, *, float32_gib, available_gib, activations_gib=None, macos="", device_name=""
):
    """Chooses dtypes for a device, from plain values.

    CPU: float32, for float16 is far slower there. CUDA: float16, except on the GTX 16 series,
    which gives NaN. MPS: float32 where it fits; else bfloat16 with a float32 VAE, since bfloat16
    has float32's range and cannot overflow where float16 does (it is coarser: 41-48 dB instead of
    52-70 dB against float32 on a small model); else, before macOS 14, which brought bfloat16,
    float16 with a float32 VAE, under a warning. Where nothing fits, the smallest of these is taken
    all the same: `find_memory_caution` says so.

    Args:
        device_type: "mps", "cuda" or "cpu".
        float32_gib: What the weights take as float32.
        available_gib: Memory that is free for them.
        activations_gib: What a generation takes besides, in float32; None if that is not known.
        macos: The macOS version, such as "14.5", or "".
        device_name: The card's name on CUDA.

    Returns:
        {component: dtype name} with a "default" for all that are not named, and the reason.

    References:
        GTX 16: pytorch#58123. MPS: diffusers#11229, pytorch#187521.
    """
    if device_type == "cpu":
        return {"default": "float32"}, "CPU: float32, exact and faster than float16 there"
    if device_type == "cuda":
        if "GTX 16" in device_name:
            return {"default": "float32"}, f"{device_name}: gives NaN in float16 (pytorch#58123)"
        return {"default": "float16"}, "CUDA: float16 is stable, half the memory and faster"
    needed_gib = _add_activations(float32_gib, activations_gib)
    memory = f"about {needed_gib:.1f} GiB needed as float32, {available_gib:.1f} GiB available"
    if needed_gib <= available_gib:
        return {"default": "float32"}, f"MPS: float32 is stable and fits ({memory})"
    if int((macos or "0").split(".")[0]) >= 14:
        return {"default": "bfloat16", "vae": "float32"}, (
            f"MPS: float32 does not fit ({memory}); bfloat16 has its range, the VAE stays float32"
        )
    return {"default": "float16", "vae": "float32"}, (
        f"MPS: float32 does not fit ({memory}) and macOS {macos or 'unknown'} has no bfloat16 "
        "(14 has); float16, the VAE stays float32"
    )


def check_dtype(dtype):
    """Returns a `dtype` argument unchanged if it may be one: whatever the model turns out to be.

    Raises:
        ValidationError: An unknown name.
    """
    for name in dtype.values() if isinstance(dtype, dict) else (dtype,):
        if not (isinstance(dtype, str) and dtype == "auto"):
            _parse_dtype(name)
    return dtype


def assign_dtypes(dtype, components, policy):
    """Gives every component its dtype.

    Args:
        dtype: "auto" (the policy's), a dtype or its name for all, or a dict of them by component,
            where "default" stands for the rest (the policy's, if it is missing).
        components: Names of the model components.
        policy: What `choose_dtypes` returned.

    Returns:
        {component: torch.dtype}, and the reason.

    Raises:
        ValidationError: An unknown dtype or component, with those that there are.
    """
    chosen, reason = policy
    if isinstance(dtype, str) and dtype == "auto":
        asked = {}
    elif isinstance(dtype, dict):
        unknown = [name for name in dtype if name not in (*components, "default")]
        if unknown:
            raise ValidationError(
                f"dtype: {unknown[0]!r} is no model component here. Expected some of "
                f"{', '.join(components)}, default."
            )
        asked = dict(dtype)
        left = [name for name in components if name not in asked]
        if "default" in asked:
            asked.update(dict.fromkeys(left, asked.pop("default")))
            left = []
        reason = "asked for" + (f"; {', '.join(left)} by policy, {reason}" if left else "")
    else:
        asked, reason = dict.fromkeys(components, dtype), "asked for"
    chosen = {name: chosen.get(name, chosen["default"]) for name in components} | asked
    return {name: _parse_dtype(value) for name, value in chosen.items()}, reason


def find_cautions(device_type, dtypes):
    """Returns what is known to go wrong with a configuration, from plain values.

    What a device does wrong whatever its version is tried on the device: `sdkit.attention`.

    Args:
        device_type: "mps", "cuda" or "cpu".
        dtypes: The torch.dtypes in use.

    Returns:
        One line each.
    """
    if device_type != "mps" or torch.float16 not in dtypes:
        return []
    return [
        "float16 on MPS is where black images come from: keep the guard on, and see "
        "notebooks/01_diagnose_black_images.ipynb"
    ]


def find_memory_caution(device_type, *, weights_gib, available_gib, activations_gib=None):
    """Returns what to say where a model is too large for the machine, from plain values.

    Args:
        device_type: "mps", "cuda" or "cpu". What a weight needs was measured on MPS alone.
        weights_gib: What the weights take in the dtypes that they got.
        available_gib: Memory that was free for them before.
        activations_gib: What a generation takes besides; None if that is not known.

    Returns:
        One line, or none: as `find_cautions` does.
    """
    needed_gib = _add_activations(weights_gib, activations_gib)
    if device_type != "mps" or needed_gib <= available_gib:
        return []
    return [
        f"memory does not suffice: about {needed_gib:.1f} GiB needed in these dtypes, "
        f"{available_gib:.1f} GiB available; expect swapping or a stop. Close other programs, or "
        "choose a smaller model"
    ]


def _add_activations(weights_gib, activations_gib):
    if activations_gib is None:
        return weights_gib * MEMORY_PER_WEIGHT
    return (weights_gib + activations_gib) * MARGIN


def dtype_name(dtype):
    """Returns "float16" for torch.float16."""
    return str(dtype).removeprefix("torch.")


def _parse_dtype(value):
    found = DTYPES.get(value) if isinstance(value, str) else value
    if found not in DTYPES.values():
        raise ValidationError(
            f"dtype={value!r}: expected auto, {', '.join(DTYPES)}, or a dict of them by component."
        )
    return found

"""Tensors on disk under a name made of all that they depend on: what is stale has another name.

A file that was cut off or altered is known by its checksum, and counts as not there.
"""

import contextlib
import hashlib
import json
import time
import warnings
from pathlib import Path

import psutil
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from sdkit.run_folder import replace_file
from sdkit.validation import ValidationError

FORMAT = "sdkit-encoded-1"  # another number, and everything is encoded anew
ABANDONED_SECONDS = 60
# What a configuration says of files and versions, not of what the model computes.
IRRELEVANT_SETTINGS = {"dtype", "torch_dtype", "transformers_version", "scaling_factor"}


def make_key(**parts) -> str:
    """Returns a hash of everything that some tensors depend on."""
    text = json.dumps([FORMAT, parts], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:40]


def hash_model(model, parts=("",)) -> str:
    """Returns a hash of a model's class, configuration and weights, to the last bit.

    Args:
        model: Of diffusers or transformers.
        parts: Beginnings of the names of the weights that matter.
    """
    config = model.config.to_dict() if hasattr(model.config, "to_dict") else dict(model.config)
    settings = {
        name: repr(value)
        for name, value in config.items()
        if not name.startswith("_") and name not in IRRELEVANT_SETTINGS
    }
    weights = {k: v for k, v in model.state_dict().items() if k.startswith(tuple(parts))}
    return make_key(kind=type(model).__name__, settings=settings, weights=hash_tensors(weights))


def hash_tensors(tensors: dict) -> str:
    """Returns a hash of tensors by name."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)} ".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def open_cache(folder) -> Path:
    """Makes the folder, and removes what a killed process left in it.

    Raises:
        ValidationError: It cannot be made.
    """
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise _refuse(folder, error) from error
    for leftover in folder.glob(".*.part"):
        pid = leftover.suffixes[-2].lstrip(".") if len(leftover.suffixes) > 1 else ""
        if pid.isdigit() and not psutil.pid_exists(int(pid)) and _is_old(leftover):
            with contextlib.suppress(OSError):  # a cache that is whole may be read alone
                leftover.unlink()
    return folder


def _is_old(path):
    try:
        return time.time() - path.stat().st_mtime > ABANDONED_SECONDS
    except FileNotFoundError:
        return False


def save_tensors(path: Path, tensors: dict) -> Path:
    """Writes tensors with their checksum; the file is whole or not there.

    Raises:
        ValidationError: The disk refuses it.
    """
    try:
        with replace_file(path) as temporary:
            save_file(tensors, temporary, metadata={"checksum": hash_tensors(tensors)})
    except (OSError, SafetensorError) as error:
        raise _refuse(path, error) from error
    return path


def load_tensors(path: Path, names, count) -> dict | None:
    """Returns the tensors of a file, or None if it is missing, or damaged: that is warned of.

    Args:
        path: Of the file.
        names: Of the tensors that it must hold.
        count: How many rows each of them must have.

    Raises:
        ValidationError: The disk refuses it.
    """
    if not path.exists():
        return None
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            is_sound = (file.metadata() or {}).get("checksum") == hash_tensors(tensors)
        rows = {name: len(tensor) for name, tensor in tensors.items() if tensor.dim()}
        is_sound = is_sound and rows == dict.fromkeys(names, count)
    except SafetensorError:
        is_sound = False
    except OSError as error:
        raise _refuse(path, error) from error
    if is_sound:
        return tensors
    warnings.warn(f"{path}: damaged, so its images are encoded again", stacklevel=2)
    return None


def _refuse(path, error):
    return ValidationError(
        f"{path}: cannot be used ({error}). Expected a folder with room for encoded images; free "
        "space, check its permissions, or choose another cache_folder."
    )

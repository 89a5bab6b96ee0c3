"""Whatever names a model, opened as shapes: modules on the meta device, without any values."""

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel

from sdkit.loading.checkpoint import find_checkpoint
from sdkit.loading.modules import find_models
from sdkit.memory import ARCHITECTURES, build_architecture, read_architecture
from sdkit.memory.architectures import build_configuration, copy_onto_meta, is_traceable
from sdkit.validation import ValidationError

CONFIG_NAME = "config.json"
PARTS = {UNet2DConditionModel: "unet", AutoencoderKL: "vae"}


def open_shapes(model):
    """Returns a name and {component: module on the meta device}.

    Args:
        model: As in `predict_memory`.

    Raises:
        ValidationError: It is no Stable Diffusion 1.x, 2.x or XL.
    """
    if isinstance(model, str) and model in ARCHITECTURES:
        return model, build_architecture(model)
    if isinstance(model, torch.nn.Module):
        return _open_parts(type(model).__name__, _name_part(model))
    if hasattr(model, "components"):
        name = str(model.config.get("_name_or_path") or type(model).__name__)
        return _open_parts(name, find_models(model))
    if isinstance(model, Mapping):
        return _open_mapping(model)
    file = _find_config_file(model)
    if file is not None:
        return _open_mapping(_read_config(file))
    checkpoint = find_checkpoint(model, local_files_only=True)
    components = read_architecture(checkpoint.config_folder, checkpoint.components)
    return checkpoint.resolved, _check_is_traceable(checkpoint.asked, components)


def _open_mapping(model):
    """One configuration, or {component: configuration or module}."""
    parts = (
        model if model and not any(key in model for key in ("_class_name", "in_channels")) else {}
    )
    if not parts or not all(map(_is_part, parts.values())):
        module = _build("configuration", model)
        return _open_parts(type(module).__name__, _name_part(module))
    modules = {
        name: part if isinstance(part, torch.nn.Module) else _build(name, part)
        for name, part in parts.items()
    }
    return _open_parts(", ".join(modules), modules)


def _is_part(value):
    return isinstance(value, (torch.nn.Module, Mapping)) or hasattr(value, "to_dict")


def _build(name, config):
    try:
        module = build_configuration(config)
    except (TypeError, ValueError, AttributeError) as error:  # whatever the classes meet
        reason = " ".join(str(error).split())
        raise ValidationError(f"{name}: no model can be made of it ({reason:.200}).") from error
    if module is None:
        raise ValidationError(
            f"{name}: tells no class of diffusers or transformers. Expected the configuration of a "
            'UNet or a VAE, such as `unet.config`, or {"unet": .., "vae": ..}.'
        )
    return module


def _name_part(module):
    module = getattr(module, "_orig_mod", module)
    return {PARTS.get(type(module), type(module).__name__): module}


def _find_config_file(model):
    """The configuration of a single component, if a file or folder is that."""
    path = Path(str(model))
    if path.suffix == ".json" and path.is_file():
        return path
    is_component = not (path / "model_index.json").is_file() and (path / CONFIG_NAME).is_file()
    return path / CONFIG_NAME if is_component else None


def _read_config(path):
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValidationError(f"{path}: no configuration can be read there ({error}).") from error
    if not isinstance(config, dict):
        raise ValidationError(f"{path}: holds {type(config).__name__}, expected a configuration.")
    return config


def _open_parts(name, components):
    """Copies of modules on the meta device, from under `torch.compile`."""
    components = {part: getattr(m, "_orig_mod", m) for part, m in components.items()}
    _check_is_traceable(name, components)
    return name, {part: copy_onto_meta(module) for part, module in components.items()}


def _check_is_traceable(name, components):
    if not is_traceable(components):
        found = ", ".join(type(module).__name__ for module in components.values()) or "no model"
        raise ValidationError(
            f"{name}: {found}. Expected Stable Diffusion 1.x, 2.x or XL (UNet2DConditionModel and "
            f"AutoencoderKL), or one of {', '.join(ARCHITECTURES)}; others are not predicted."
        )
    return components

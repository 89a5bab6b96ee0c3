"""The configuration that a single .safetensors file does not hold: a folder of the same make."""

from pathlib import Path

import huggingface_hub
from diffusers.loaders.single_file_utils import fetch_diffusers_config, load_single_file_checkpoint

from sdkit.validation import ValidationError

CONFIG_FILES = ["*.json", "*/*.json", "*/*.txt", "*/*.model"]


def find_config_folder(path, config, local_files_only):
    """Returns a folder with the model_index.json, configurations and tokenizer of a single file.

    Args:
        path: The .safetensors file.
        config: A pipeline folder, a Hub id, or None: the Hub id that diffusers infers from the
            names of the weights.
        local_files_only: Look into the Hub's cache, but do not ask the Hub.

    Returns:
        The folder.

    Raises:
        ValidationError: There is none: with what `config` has to be.
    """
    if config is not None and Path(config).is_dir():
        return Path(config)
    name = str(config) if config is not None else _infer_config(path)
    try:
        return Path(
            huggingface_hub.snapshot_download(
                name, allow_patterns=CONFIG_FILES, local_files_only=local_files_only
            )
        )
    except Exception as error:  # the Hub's client and its transport have many
        raise ValidationError(
            f"{path.name}: a single file holds weights alone, and its configuration, {name}, is no "
            f"folder, not in the local cache, and {describe_hub_failure(error, local_files_only)}. "
            "Offline, give config= a pipeline folder of the same architecture (model_index.json, "
            "unet/config.json, tokenizer/ and so on)."
        ) from error


def describe_hub_failure(error, local_files_only):
    """Says in a few words why the Hub gave nothing."""
    if local_files_only:
        return "the Hub was not asked (local_files_only)"
    if huggingface_hub.constants.HF_HUB_OFFLINE:
        return "the Hub was not asked (offline: HF_HUB_OFFLINE is set)"
    return f"the Hub gave nothing ({type(error).__name__})"


def _infer_config(path):
    weights = load_single_file_checkpoint(str(path))
    return fetch_diffusers_config(weights)["pretrained_model_name_or_path"]

"""The layout of kohya's scripts, which A1111 and ComfyUI read."""

import json
from pathlib import Path

import safetensors.torch
import torch
from diffusers.loaders.lora_base import LORA_ADAPTER_METADATA_KEY
from diffusers.utils import convert_state_dict_to_kohya

from sdkit.finetuning.adapter_file import find_adapter_file, read_raw_metadata, read_weights
from sdkit.run_folder import replace_file
from sdkit.validation import ValidationError, check_is_writable


def export_kohya(path, output_path) -> Path:
    """Writes an adapter in kohya's layout.

    diffusers' own conversion does it, but it writes the rank as alpha: an adapter of alpha 16 and
    rank 8 would have half its effect. And it names the text encoder of Stable Diffusion 1.x and 2.x
    as the first of SDXL's (diffusers 0.42.1; test_kohya in tests/test_adapter.py).

    Args:
        path: The adapter's file, or the folder of a run.
        output_path: The file to write.

    Returns:
        `output_path`.

    Raises:
        ValidationError: The file is not one that a training of sdkit wrote, it holds NaN or Inf, or
            there is no room.
    """
    path, output_path = find_adapter_file(path), Path(output_path)
    metadata = read_raw_metadata(path)
    if LORA_ADAPTER_METADATA_KEY not in metadata:
        raise ValidationError(
            f"{path}: does not say its alpha. Expected a file that a training of sdkit wrote."
        )
    settings = json.loads(metadata[LORA_ADAPTER_METADATA_KEY])
    component = next(iter(settings)).partition(".")[0]
    rank, alpha = settings[f"{component}.r"], settings[f"{component}.lora_alpha"]
    weights = {
        key.replace("lora_te1_", "lora_te_"): value.contiguous()
        for key, value in convert_state_dict_to_kohya(read_weights(path)).items()
    }
    weights |= {key: torch.tensor(float(alpha)) for key in weights if key.endswith(".alpha")}
    about = {  # what kohya's tools show of a file, and what is known of its making
        "ss_network_module": "networks.lora",
        "ss_network_dim": str(rank),
        "ss_network_alpha": str(alpha),
        **{key: value for key, value in metadata.items() if key.startswith("sdkit.")},
    }
    content = safetensors.torch.save(weights, metadata=about)
    check_is_writable(output_path.parent)
    try:
        with replace_file(output_path) as temporary:
            temporary.write_bytes(content)
    except OSError as error:
        raise ValidationError(
            f"{output_path}: cannot be written ({error.strerror}). Expected room for "
            f"{len(content):,} bytes; free some, or choose another path."
        ) from error
    return output_path

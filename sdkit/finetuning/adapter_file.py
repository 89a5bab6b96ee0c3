"""The adapter's file: what diffusers loads, with where it came from written into its metadata."""

import json
from pathlib import Path

import safetensors.torch
import torch
from diffusers.loaders.lora_base import LORA_ADAPTER_METADATA_KEY
from diffusers.utils import convert_state_dict_to_kohya
from safetensors import SafetensorError, safe_open

from sdkit.device import describe_environment
from sdkit.finetuning.adapter import ADAPTER_NAME, read_adapter
from sdkit.finetuning.checkpoints import ADAPTER_FILE
from sdkit.finetuning.gates import check_state
from sdkit.run_folder import replace_file
from sdkit.validation import ValidationError, is_finite

CAPTION_EXAMPLES = 5
BASE_SAMPLES = 64
VERSIONS = ("python", "torch", "diffusers", "transformers", "peft", "accelerate")
# What rebuilds the layers. The rest of peft's configuration changes from version to version, and
# an older peft refuses a file that names a setting it does not know.
PEFT_SETTINGS = (
    "r", "lora_alpha", "target_modules", "rank_pattern", "alpha_pattern", "use_dora", "lora_bias",
)  # fmt: skip


def describe_training(pipe, config, encoded) -> dict:
    """Returns the metadata of an adapter: {name: text}.

    Args:
        pipe: The pipeline, before its adapter has changed anything.
        config: A LoRAConfig.
        encoded: The EncodedDataset that it learns from.
    """
    environment = describe_environment(str(pipe.device))
    examples = sorted(set(encoded.captions))[:CAPTION_EXAMPLES]
    own = {
        "config": {k: v for k, v in config.to_dict().items() if not k.endswith("_folder")},
        "base_model": str(pipe.config.get("_name_or_path") or config.model),
        "base_sample": sample_weights(pipe.unet),
        "dataset": {"fingerprint": encoded.fingerprint, "images": len(encoded.names)},
        "caption_examples": examples,
        "versions": {name: environment[name] for name in VERSIONS if name in environment},
    }
    return {f"sdkit.{name}": json.dumps(value) for name, value in own.items()}


def sample_weights(unet) -> list:
    """Returns a few frozen weights, spread over the UNet: they tell one base from another."""
    frozen = {
        name.replace(".base_layer.", "."): parameter
        for name, parameter in unet.named_parameters()
        if ".lora_" not in name and parameter.dim() > 1
    }
    names = sorted(frozen)
    picked = names[:: max(1, len(names) // BASE_SAMPLES)][:BASE_SAMPLES]
    return [float(frozen[name].detach().flatten()[0]) for name in picked]


def pack_adapter(pipe, metadata: dict) -> bytes:
    """Returns the bytes of `pytorch_lora_weights.safetensors`, after the finite gate.

    Args:
        pipe: The pipeline with the adapter.
        metadata: {name: text} beside what diffusers itself needs (rank and alpha).

    Raises:
        ValidationError: A weight is NaN or Inf.
    """
    weights, settings = {}, {}
    for name, state in read_adapter(pipe).items():
        check_state(state, f"adapter of the {name}")
        # Names are peft's. With diffusers' older ones ("lora.down") and a convolution among the
        # targets, diffusers 0.42.1 loads the convolutions and leaves the attention out.
        # Guarded by test_the_file_loads_with_plain_diffusers in tests/test_adapter.py.
        weights |= {f"{name}.{_name_layer(name, key)}": value for key, value in state.items()}
        peft_config = getattr(pipe, name).peft_config[ADAPTER_NAME].to_dict()
        for key in PEFT_SETTINGS:
            value = peft_config[key]
            settings[f"{name}.{key}"] = sorted(value) if isinstance(value, set) else value
    own = {"format": "pt", LORA_ADAPTER_METADATA_KEY: json.dumps(settings, sort_keys=True)}
    return safetensors.torch.save(weights, metadata={**own, **metadata})


def _name_layer(component, key):
    # transformers 5 dropped this part from its text encoders' names; files have it everywhere.
    is_short = component == "text_encoder" and not key.startswith("text_model.")
    return f"text_model.{key}" if is_short else key


def unpack_adapter(content: bytes) -> dict:
    """Returns {component: {peft's name: tensor}} of an adapter's bytes, for `write_adapter`."""
    state = {}
    for key, value in safetensors.torch.load(content).items():
        component, _, name = key.partition(".")
        state.setdefault(component, {})[name] = value
    return state


def read_metadata(path) -> dict:
    """Returns what `describe_training` wrote into a file, {name: value}; empty if it is not ours.

    Raises:
        ValidationError: It is no safetensors file.
    """
    path = _find_file(path)
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
    except (OSError, SafetensorError) as error:
        raise ValidationError(
            f"{path}: cannot be read ({error}). Expected {ADAPTER_FILE}, as a training writes it."
        ) from error
    return {
        key.removeprefix("sdkit."): json.loads(value)
        for key, value in metadata.items()
        if key.startswith("sdkit.")
    }


def load_adapter(pipe, path, *, any_base=False):
    """Loads an adapter with diffusers' own `load_lora_weights`, onto its own base alone.

    Args:
        pipe: A StableDiffusionPipeline, changed in place.
        path: The file, or the folder of a run.
        any_base: Load it though it was trained on other weights of the same architecture.

    Returns:
        The pipeline.

    Raises:
        ValidationError: It was made for another base model.
    """
    path = _find_file(path)
    metadata = read_metadata(path)
    base = metadata.get("base_model", "an unknown model")
    _check_shapes(pipe, path, base)
    if not any_base and "base_sample" in metadata:
        tolerance = max(torch.finfo(pipe.unet.dtype).eps, 1e-6)
        own, theirs = sample_weights(pipe.unet), metadata["base_sample"]
        is_same = len(own) == len(theirs) and torch.allclose(
            torch.tensor(own), torch.tensor(theirs), rtol=tolerance, atol=1e-7
        )
        if not is_same:
            raise ValidationError(
                f"{path}: was trained on {base}, whose weights are not those of this pipeline. "
                "Load that model, or say any_base=True to try it all the same."
            )
    pipe.load_lora_weights(path.parent, weight_name=path.name)
    return pipe


def _check_shapes(pipe, path, base):
    """Refuses an adapter whose layers this pipeline does not have, or has in another size."""
    for key, weight in safetensors.torch.load_file(path).items():
        component, _, name = key.partition(".")
        layer, _, part = name.partition(".lora_")
        layer = layer.removeprefix("text_model.")
        layers = dict(getattr(pipe, component, torch.nn.Module()).named_modules())
        found = layers.get(layer, layers.get(f"text_model.{layer}"))
        side = 1 if part.startswith("A") else 0
        if found is None or found.weight.shape[side] != weight.shape[side]:
            seen = "no such layer" if found is None else f"a weight of {tuple(found.weight.shape)}"
            raise ValidationError(
                f"{path}: was trained on {base}; for its {component}.{layer} this pipeline has "
                f"{seen}. Load the model that it was trained on."
            )


def export_kohya(path, output_path) -> Path:
    """Writes an adapter in the layout that kohya's scripts, A1111 and ComfyUI read.

    diffusers' own conversion does it, but it writes the rank as alpha: an adapter of alpha 16 and
    rank 8 would have half its effect. Guarded by test_kohya in tests/test_adapter.py.

    Args:
        path: The adapter's file, or the folder of a run.
        output_path: The file to write.

    Returns:
        `output_path`.
    """
    path, output_path = _find_file(path), Path(output_path)
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata() or {}
    if LORA_ADAPTER_METADATA_KEY not in metadata:
        raise ValidationError(
            f"{path}: does not say its alpha. Expected a file that a training of sdkit wrote."
        )
    settings = json.loads(metadata[LORA_ADAPTER_METADATA_KEY])
    weights = convert_state_dict_to_kohya(safetensors.torch.load_file(path))
    alpha, rank = (
        next(v for k, v in settings.items() if k.endswith(f".{name}"))
        for name in ("lora_alpha", "r")
    )
    for key in weights:
        if key.endswith(".alpha"):
            weights[key] = torch.tensor(float(alpha))
    # What kohya's tools show of a file, and the parts of ours.
    weights = {
        key.replace("lora_te1_", "lora_te_"): value.contiguous() for key, value in weights.items()
    }
    about = {
        "ss_network_module": "networks.lora",
        "ss_network_dim": str(rank),
        "ss_network_alpha": str(alpha),
    }
    about |= {key: value for key, value in metadata.items() if key.startswith("sdkit.")}
    content = safetensors.torch.save(weights, metadata=about)
    with replace_file(output_path) as temporary:
        temporary.write_bytes(content)
    return output_path


def merge_adapter(pipe, *, scale=1.0):
    """Adds the loaded adapter to the weights themselves, which then take no time of their own.

    Args:
        pipe: A pipeline with an adapter, changed in place.
        scale: How much of it.

    Returns:
        The pipeline.

    Raises:
        ValidationError: A merged weight would be NaN or Inf, as float16 can make it; nothing was
            merged.
    """
    try:
        pipe.fuse_lora(components=_find_adapted(pipe), lora_scale=scale, safe_fusing=True)
    except ValueError as error:
        pipe.unfuse_lora(components=_find_adapted(pipe))
        raise ValidationError(
            f"merge: {error} Expected finite weights. Merge in float32, or with a smaller scale."
        ) from error
    return _check_weights(pipe, "merge")


def unmerge_adapter(pipe):
    """Takes a merged adapter out again; the weights come back but for rounding.

    Returns:
        The pipeline.

    Raises:
        ValidationError: A weight is NaN or Inf afterwards.
    """
    pipe.unfuse_lora(components=_find_adapted(pipe))
    return _check_weights(pipe, "unmerge")


def _find_adapted(pipe):
    return [
        name
        for name in ("unet", "text_encoder")
        if getattr(getattr(pipe, name, None), "peft_config", None)
    ]


def _check_weights(pipe, where):
    for name in _find_adapted(pipe):
        for key, parameter in getattr(pipe, name).named_parameters():
            if not is_finite(parameter):
                raise ValidationError(
                    f"{where}: {name}.{key} holds NaN or Inf. Expected finite weights. Load the "
                    "pipeline again."
                )
    return pipe


def _find_file(path):
    path = Path(path)
    return path / ADAPTER_FILE if path.is_dir() else path

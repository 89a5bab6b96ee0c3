"""The adapter's file: what diffusers loads, with where it came from written into its metadata."""

import json
from pathlib import Path

import safetensors.torch
import torch
from diffusers.loaders.lora_base import LORA_ADAPTER_METADATA_KEY
from peft import get_peft_model_state_dict
from safetensors import SafetensorError, safe_open

from sdkit.device import describe_environment
from sdkit.finetuning.adapter import ADAPTER_NAME, find_targets, is_target, read_adapter
from sdkit.finetuning.checkpoints import ADAPTER_FILE
from sdkit.finetuning.config import LoRAConfig
from sdkit.finetuning.gates import check_state
from sdkit.validation import ValidationError, check_finite

CAPTION_EXAMPLES = 5
BASE_SAMPLES = 64
SHOWN_LETTERS = 300  # of what diffusers says
# Of peft, of older diffusers and of kohya; the rest are numbers such as alpha.
WEIGHT_ENDINGS = (".lora_A.weight", ".lora_B.weight", "down.weight", "up.weight")
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
    return _sort_header(safetensors.torch.save(weights, metadata={**own, **metadata}))


def read_header(content: bytes) -> dict:
    """Returns the header of an adapter's bytes: {name of a weight: about it}, and the metadata."""
    return json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])


def _sort_header(content):
    """Puts a file's metadata in order, which the library does not: equal runs, equal files."""
    end = 8 + int.from_bytes(content[:8], "little")
    header = read_header(content)
    header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)  # the tensors begin at a multiple of 8
    return len(text).to_bytes(8, "little") + text + content[end:]


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


def read_raw_metadata(path) -> dict:
    """Returns the metadata of a file, {name: text}.

    Raises:
        ValidationError: It is no safetensors file.
    """
    try:
        with safe_open(path, framework="pt") as file:
            return file.metadata() or {}
    except (OSError, SafetensorError) as error:
        raise ValidationError(
            f"{path}: cannot be read ({error}). Expected {ADAPTER_FILE}, as a training writes it."
        ) from error


def read_weights(path) -> dict:
    """Returns the weights of a file, {name: tensor}.

    Raises:
        ValidationError: It is no safetensors file, or one of them is NaN or Inf.
    """
    path = find_adapter_file(path)
    read_raw_metadata(path)
    weights = safetensors.torch.load_file(path)
    for name, weight in weights.items():
        check_finite(weight, f"{path.name}: {name}")
    return weights


def read_metadata(path) -> dict:
    """Returns what `describe_training` wrote into a file, {name: value}; empty if it is not ours.

    Raises:
        ValidationError: It is no safetensors file, or what it says of itself is damaged.
    """
    path = find_adapter_file(path)
    found = {}
    for key, value in read_raw_metadata(path).items():
        if key.startswith("sdkit."):
            try:
                found[key.removeprefix("sdkit.")] = json.loads(value)
            except ValueError as error:
                raise ValidationError(
                    f"{path}: what it says of {key} is damaged ({error}). Expected a file as a "
                    "training writes it."
                ) from error
    return found


def load_adapter(pipe, path, *, any_base=False):
    """Loads an adapter with diffusers' own `load_lora_weights`, onto its own base alone.

    Args:
        pipe: A StableDiffusionPipeline, changed in place.
        path: The file, or the folder of a run.
        any_base: Load it though it was trained on other weights of the same architecture.

    Returns:
        The pipeline.

    Raises:
        ValidationError: It holds NaN or Inf, was made for another base model, or is no adapter for
            this pipeline: not each of its weights finds its place, or not each layer its weights.
    """
    path = find_adapter_file(path)
    metadata, weights = read_metadata(path), read_weights(path)
    base = metadata.get("base_model", "an unknown model")
    _check_shapes(pipe, path, weights, base)
    if "targets" in metadata.get("config", {}):
        _check_has_all_layers(pipe, path, weights, metadata["config"]["targets"])
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
    before = _list_adapters(pipe)
    try:
        pipe.load_lora_weights(path.parent, weight_name=path.name)
    except Exception as error:  # a file of any origin: its conversion may fail in any way
        _take_off(pipe, before)
        reason = " ".join(str(error).split())[:SHOWN_LETTERS]
        raise ValidationError(
            f"{path}: diffusers cannot load it ({reason}). Expected a LoRA of this architecture."
        ) from error
    return _check_is_whole(pipe, path, weights, before)


def _check_is_whole(pipe, path, weights, before):
    """Returns a pipeline whose adapter's weights all came from its file.

    Symptom: a layer without its lora_B is loaded with what memory held. Versions: diffusers 0.42.1,
    which makes layers empty and fills in what the file has. Source: load_lora_adapter in its
    loaders/peft.py. Guarded by test_an_adapter_that_is_not_whole_is_refused in test_adapter.py.
    """
    given = [key for key in weights if key.endswith(WEIGHT_ENDINGS)]
    count = sum(
        len(get_peft_model_state_dict(getattr(pipe, component), adapter_name=name))
        for component, name in _list_adapters(pipe) - before
    )
    if not given or count != len(given):
        _take_off(pipe, before)
        raise ValidationError(
            f"{path}: has {len(given)} weights of layers, and its layers in this pipeline {count}. "
            "Expected as many, and some; it is damaged, or made for something else."
        )
    return pipe


def _list_adapters(pipe):
    components = ("unet", "text_encoder")
    return {(c, name) for c in components for name in getattr(getattr(pipe, c), "peft_config", {})}


def _take_off(pipe, before):
    """Removes the adapters that came to those before."""
    if before:
        pipe.delete_adapters(sorted({name for _, name in _list_adapters(pipe) - before}))
    else:
        pipe.unload_lora_weights()


def _check_shapes(pipe, path, weights, base):
    """Refuses an adapter whose layers this pipeline does not have, or has in another size."""
    layers = _list_layers(pipe)
    for key, weight in weights.items():
        name, part = _split_key(key)
        if part not in ("A.weight", "B.weight"):
            continue  # another layout, which diffusers converts
        found, side = layers.get(name), 1 if part == "A.weight" else 0
        shape = getattr(getattr(found, "weight", None), "shape", None)  # a block has none itself
        if shape is None or weight.dim() < 2 or shape[side] != weight.shape[side]:
            seen = "no such layer" if shape is None else f"a weight of {tuple(shape)}"
            raise ValidationError(
                f"{path}: was trained on {base}; for its {name} this pipeline has {seen}. Load "
                "the model that it was trained on."
            )


def _check_has_all_layers(pipe, path, weights, targets):
    """Refuses an adapter without a layer of its training, which diffusers would leave as it is."""
    given = {_split_key(key)[0] for key in weights}
    endings = find_targets(LoRAConfig(targets=targets))
    wanted = [
        layer
        for layer in _list_layers(pipe)
        if is_target(layer, endings.get(layer.partition(".")[0], ()))
    ]
    lost = [layer for layer in wanted if layer not in given]
    if lost:
        raise ValidationError(
            f"{path}: has no weights for {len(lost)} of the {len(wanted)} layers of its training, "
            f"such as {lost[0]}. It is damaged; copy it again."
        )


def _list_layers(pipe):
    """{path from the pipeline: module} of all that an adapter may be on."""
    return {
        f"{component}.{name.removeprefix('text_model.')}": layer
        for component in ("unet", "text_encoder")
        for name, layer in getattr(pipe, component).named_modules()
    }


def _split_key(key):
    """(layer, "A.weight" or "B.weight") of a weight; another layout has "" behind."""
    layer, _, part = key.replace("text_encoder.text_model.", "text_encoder.").partition(".lora_")
    return layer, part


def find_adapter_file(path) -> Path:
    """Returns the adapter's file of a path to it or to the folder of a run."""
    path = Path(path)
    return path / ADAPTER_FILE if path.is_dir() else path

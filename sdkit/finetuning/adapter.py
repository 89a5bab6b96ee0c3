"""The adapter: low-rank layers on a frozen pipeline, their weights, and how they start."""

# r rank; a layer of weight W (out, in) becomes W + alpha / r * B (out, r) @ A (r, in)

import math

import torch
from peft import LoraConfig, get_peft_model_state_dict, set_peft_model_state_dict

from sdkit.finetuning.config import TEXT_ENCODER_MODULES, LoRAConfig
from sdkit.finetuning.keyed_random import keyed_generator
from sdkit.validation import ValidationError

ADAPTER_NAME = "default"  # peft's own


def add_adapter(pipe, config: LoRAConfig) -> dict:
    """Freezes a pipeline and gives its UNet, and its text encoder if asked for, a LoRA adapter.

    A is drawn from the seed on the CPU, so it is the same on every device; B is zero, so the first
    pictures are those of the base.

    Args:
        pipe: A StableDiffusionPipeline of the 1.x or 2.x family, changed in place.
        config: Of the training.

    Returns:
        {name: parameter} of what is trained, float32, in a fixed order.

    Raises:
        ValidationError: Another kind of pipeline, no layer to put an adapter on, or a rank beyond
            the width of all of them.
    """
    check_is_trainable(pipe)
    for name in ("unet", "vae", "text_encoder"):
        getattr(pipe, name).requires_grad_(False)
    check_targets(pipe, config)
    for name, modules in find_targets(config).items():
        getattr(pipe, name).add_adapter(
            LoraConfig(r=config.rank, lora_alpha=config.alpha, target_modules=list(modules)),
            ADAPTER_NAME,
        )
    parameters = find_parameters(pipe)
    for name, parameter in parameters.items():
        parameter.data = _draw_start(name, parameter, config.seed).to(parameter.device)
    return parameters


def check_is_trainable(pipe):
    """Returns a pipeline unchanged if it is one that this trainer knows how to feed.

    Raises:
        ValidationError: It is not; SDXL, for one, wants pooled embeddings and sizes beside.
    """
    unet, encoder = getattr(pipe, "unet", None), getattr(pipe, "text_encoder", None)
    if (
        type(unet).__name__ != "UNet2DConditionModel"
        or encoder is None
        or getattr(pipe, "text_encoder_2", None) is not None
        or unet.config.in_channels != unet.config.out_channels
    ):
        raise ValidationError(
            f"{type(pipe).__name__}: cannot be trained here. Expected a text-to-image Stable "
            "Diffusion 1.x or 2.x (StableDiffusionPipeline)."
        )
    return pipe


def check_targets(pipe, config: LoRAConfig):
    """Returns a pipeline unchanged if it has layers for an adapter of this kind and rank.

    Raises:
        ValidationError: There is no such layer, or the rank is beyond the width of all of them.
    """
    for name, modules in find_targets(config).items():
        layers = getattr(pipe, name).named_modules()
        found = [layer for layer_name, layer in layers if is_target(layer_name, modules)]
        if not found:
            raise ValidationError(
                f"{name}: has no layer named {', '.join(modules)}. Expected some; choose other "
                "targets."
            )
        widest = max(max(layer.weight.shape[:2]) for layer in found)
        if config.rank > widest:
            raise ValidationError(
                f"rank={config.rank}: the widest of the {name}'s layers has {widest} channels. "
                "Expected a rank far below that, such as 8."
            )
    return pipe


def find_targets(config: LoRAConfig) -> dict:
    """Returns {component: name endings of its layers that get an adapter}."""
    targets = {"unet": config.target_modules} if config.target_modules else {}
    if config.trains_text_encoder:
        targets["text_encoder"] = TEXT_ENCODER_MODULES
    return targets


def find_parameters(pipe) -> dict:
    """Returns {name: parameter} of what is trained in a pipeline, in a fixed order."""
    return {
        f"{component}.{name}": parameter
        for component in ("unet", "text_encoder")
        for name, parameter in getattr(pipe, component).named_parameters()
        if parameter.requires_grad
    }


def find_trained_components(pipe) -> dict:
    """Returns {component: module} of those that hold an adapter."""
    names = dict.fromkeys(name.partition(".")[0] for name in find_parameters(pipe))
    return {name: getattr(pipe, name) for name in names}


def read_adapter(pipe) -> dict:
    """Returns {component: {peft's name: float32 tensor on the CPU}} of the adapter's weights."""
    return {
        name: {
            key: value.detach().float().cpu().contiguous()
            for key, value in get_peft_model_state_dict(
                component, adapter_name=ADAPTER_NAME
            ).items()
        }
        for name, component in find_trained_components(pipe).items()
    }


def write_adapter(pipe, state: dict):
    """Puts weights that `read_adapter` returned back into a pipeline with such an adapter.

    Raises:
        ValidationError: They do not fit.
    """
    for name, component in find_trained_components(pipe).items():
        own = get_peft_model_state_dict(component, adapter_name=ADAPTER_NAME)
        prefix = "" if any(key.startswith("text_model.") for key in own) else "text_model."
        given = {key.removeprefix(prefix): value for key, value in state.get(name, {}).items()}
        if {k: v.shape for k, v in own.items()} != {k: v.shape for k, v in given.items()}:
            raise ValidationError(
                f"{name}: the adapter's {len(given)} weights do not fit the {len(own)} of this "
                "one. Expected the same model, rank and targets."
            )
        set_peft_model_state_dict(component, given, adapter_name=ADAPTER_NAME)


def is_target(layer, modules) -> bool:
    """Whether a layer of this path has one of these name endings, as peft tells it."""
    return any(layer == ending or layer.endswith(f".{ending}") for ending in modules)


def _draw_start(name, parameter, seed):
    start = torch.zeros(parameter.shape, dtype=torch.float32)
    if ".lora_A." in name:  # as peft does, but from a generator of its own
        generator = keyed_generator(seed, "adapter", name)
        torch.nn.init.kaiming_uniform_(start, a=math.sqrt(5), generator=generator)
    return start

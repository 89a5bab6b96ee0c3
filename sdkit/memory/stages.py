"""The calls that a generation or a training step makes, one by one, and what is alive in each.

Works on modules of the meta device (a prediction: no weights, no arithmetic) and on real ones.
"""

# B batch, C channels, h w latent, L tokens, D width

from contextlib import nullcontext
from dataclasses import dataclass

import torch
from peft import LoraConfig
from torch.utils._python_dispatch import _disable_current_modes

from sdkit.memory.architectures import find_text_width
from sdkit.memory.live_bytes import LiveBytes, sdpa_as_on

TOKENS = 77
TIME_IDS = 6  # of SDXL: original size, crop, target size
ATTENTION_PROJECTIONS = ("to_q", "to_k", "to_v", "to_out.0")


@dataclass(frozen=True)
class LoraTraining:
    """What of a LoRA training decides its memory; any object with these attributes will do.

    Attributes:
        rank: Of the adapters.
        gradient_checkpointing: Whether blocks are computed again in the backward pass.
        target_modules: Layers of the UNet that get an adapter.
        optimizer: "adamw", "adam", "lion" or "sgd".
    """

    rank: int = 8
    gradient_checkpointing: bool = False
    target_modules: tuple = ATTENTION_PROJECTIONS
    optimizer: str = "adamw"


def trace_inference(components, *, latent_size, batch_size=1, device_type="cpu", guidance=True):
    """Runs each stage of a text-to-image generation once, and counts its live bytes.

    Args:
        components: {name: module}, of Stable Diffusion 1.x, 2.x or XL.
        latent_size: (h, w).
        batch_size: Images at a time.
        device_type: As which device attends; see `sdpa_as_on`. Real tensors attend as they do.
        guidance: Whether each image takes two rows of the UNet's batch.

    Returns:
        {stage: peak bytes besides the weights}.
    """
    unet, vae = components.get("unet"), components.get("vae")
    rows = 2 * batch_size if guidance else batch_size
    stages = {
        name: lambda encoder=encoder: _encode_text(encoder, batch_size)
        for name, encoder in components.items()
        if name.startswith("text_encoder")
    }
    if unet:
        stages["unet"] = lambda: _predict_noise(unet, rows, latent_size)
    if vae:
        stages["vae"] = lambda: vae.decode(
            _make(vae, batch_size, vae.config.latent_channels, *latent_size), return_dict=False
        )
    with torch.no_grad():
        return {
            name: _count_peak(stage, components[name], device_type)
            for name, stage in stages.items()
        }


def trace_training(components, training, *, latent_size, batch_size=1, device_type="cpu"):
    """Runs each stage of a LoRA training step once, and counts its live bytes.

    The adapters are added to the UNet for good, in float32. VAE and text encoders are frozen.

    Args:
        components: {name: module}; see `trace_inference`.
        training: A `LoraTraining`, or what has its attributes.
        latent_size: (h, w).
        batch_size: Images a step.
        device_type: As in `trace_inference`.

    Returns:
        {stage: peak bytes besides the weights}, gradients among them.
    """
    unet, vae = components["unet"], components.get("vae")
    add_lora(unet, training)
    stages = {
        name: lambda encoder=encoder: _encode_text(encoder, batch_size)
        for name, encoder in components.items()
        if name.startswith("text_encoder")
    }
    if vae:
        factor = 2 ** (len(vae.config.block_out_channels) - 1)
        pixels = (batch_size, vae.config.in_channels, *(factor * side for side in latent_size))
        stages["vae encoder"] = lambda: vae.encode(_make(vae, *pixels)).latent_dist.sample()
    with torch.no_grad():
        peaks = {
            name: _count_peak(stage, components[name.split()[0]], device_type)
            for name, stage in stages.items()
        }

    def step():
        noise = _make(unet, batch_size, unet.config.out_channels, *latent_size, dtype=torch.float32)
        noise_pred = _predict_noise(unet, batch_size, latent_size)
        torch.nn.functional.mse_loss(noise_pred.float(), noise).backward()

    peaks["unet, forward and backward"] = _count_peak(step, unet, device_type)
    for parameter in unet.parameters():
        parameter.grad = None
    return peaks


def add_lora(unet, training):
    """Freezes a UNet and gives it adapters in float32, in training mode.

    Args:
        unet: The UNet, changed in place.
        training: A `LoraTraining`.

    Returns:
        The parameters to train.
    """
    unet.requires_grad_(False)
    modules = training.target_modules
    modules = modules if isinstance(modules, str) else list(modules)  # peft's: a regular expression
    # Beside an adapter that is there already peft would leave a new one on the CPU.
    with unet.device:
        unet.add_adapter(LoraConfig(r=training.rank, target_modules=modules), "predicted")
    trained = [parameter for parameter in unet.parameters() if parameter.requires_grad]
    for parameter in trained:
        parameter.data = parameter.data.float()
    unet.train()
    if training.gradient_checkpointing:
        unet.enable_gradient_checkpointing()
    return trained


def _count_peak(stage, module, device_type):
    is_meta = next(module.parameters()).device.type == "meta"
    # An emulation of numbers around this has no say in what is counted.
    unemulated = _disable_current_modes() if is_meta else nullcontext()
    with unemulated, sdpa_as_on(device_type), LiveBytes(module) as live:
        stage()
    return live.peak_bytes


def _make(module, *shape, dtype=None):
    return torch.ones(shape, dtype=dtype or module.dtype, device=module.device)


def _encode_text(encoder, batch_size):
    input_ids = _make(encoder, batch_size, TOKENS, dtype=torch.int64)
    return encoder(input_ids, output_hidden_states=True)[0]


def _predict_noise(unet, rows, latent_size):
    """One call of a UNet: (rows, C, h, w)."""
    config = unet.config
    conditions = {}
    if config.addition_embed_type == "text_time":  # SDXL
        width = (
            config.projection_class_embeddings_input_dim - TIME_IDS * config.addition_time_embed_dim
        )
        conditions["added_cond_kwargs"] = {
            "text_embeds": _make(unet, rows, width),
            "time_ids": _make(unet, rows, TIME_IDS),
        }
    return unet(
        _make(unet, rows, config.in_channels, *latent_size),
        _make(unet, rows, dtype=torch.int64),
        _make(unet, rows, TOKENS, find_text_width(unet)),
        return_dict=False,
        **conditions,
    )[0]

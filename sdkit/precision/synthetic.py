"""Calls of a bare UNet or VAE with seeded noise, for when there is no pipeline to measure with."""

import torch
from diffusers import AutoencoderKL

from sdkit.memory.architectures import find_text_width

LATENT_PIXELS = 16  # ranges hardly depend on the size; a full-size UNet takes seconds here
TIMESTEPS = (999, 500, 1)
TOKENS = 77


def make_calls(model, *, seed=0) -> list:
    """Functions without arguments that call a model and return its output tensor.

    Args:
        model: An AutoencoderKL, which decodes and encodes, or a UNet2DConditionModel of Stable
            Diffusion 1.x, 2.x or XL, at three timesteps.
        seed: Of the noise, drawn on the CPU in float32.
    """
    generator = torch.Generator("cpu").manual_seed(seed)

    def draw(*shape):
        return torch.randn(shape, generator=generator).to(model.device, model.dtype)

    if isinstance(model, AutoencoderKL):
        latents = draw(1, model.config.latent_channels, LATENT_PIXELS, LATENT_PIXELS)
        size_pixels = LATENT_PIXELS * 2 ** (len(model.config.block_out_channels) - 1)
        image = draw(1, model.config.in_channels, size_pixels, size_pixels).clamp(-1, 1)
        return [
            lambda: model.decode(latents).sample,
            lambda: model.encode(image).latent_dist.parameters,
        ]
    latents = draw(1, model.config.in_channels, LATENT_PIXELS, LATENT_PIXELS)
    inputs = {"encoder_hidden_states": draw(1, TOKENS, find_text_width(model))}
    if model.config.addition_embed_type == "text_time":
        width = model.config.addition_time_embed_dim
        pooled = model.config.projection_class_embeddings_input_dim
        ids = 6 if (pooled - 6 * width) > 0 else pooled // width
        inputs["added_cond_kwargs"] = {
            "text_embeds": draw(1, pooled - ids * width),
            "time_ids": torch.full((1, ids), 512.0, device=model.device, dtype=model.dtype),
        }

    def call(timestep):
        return lambda: model(latents, torch.tensor(timestep, device=model.device), **inputs).sample

    return [call(timestep) for timestep in TIMESTEPS]

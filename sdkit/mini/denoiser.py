"""Trains the bundled text encoder and UNet together, on latents without white studios."""

# B batch, h w latent, L tokens, D width

from pathlib import Path

import torch
from diffusers import UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor
from diffusers.training_utils import compute_snr
from transformers import CLIPTextModel, CLIPTokenizer

from sdkit.mini.catalogue import BASE_BACKGROUNDS, FRAMES, Product
from sdkit.mini.recipe import Recipe, make_scheduler, make_text_encoder, make_unet
from sdkit.mini.training import train


def train_denoiser(
    recipe: Recipe,
    latents: torch.Tensor,
    products: list[Product],
    *,
    tokenizer: CLIPTokenizer,
    scaling_factor: float,
    folder: Path,
    device: torch.device,
) -> tuple[CLIPTextModel, UNet2DConditionModel]:
    """Trains text encoder and UNet, or continues.

    Args:
        recipe: Steps, batch size, rate, caption dropout, min-SNR gamma.
        latents: Posterior means, (N, 4, h, w), unscaled: the decoder is at ease with noise, the
            denoiser need not learn to make it.
        products: What each latent shows.
        tokenizer: For the captions.
        scaling_factor: Of the autoencoder.
        folder: For state and log.
        device: Where to train.

    Returns:
        Both models with averaged weights.
    """
    torch.manual_seed(recipe.seed + 1)
    text_encoder, unet = make_text_encoder(tokenizer).to(device), make_unet().to(device)
    # The backward of fused attention takes a third of a step on a CPU (torch 2.13): 1.5 s, now 0.9.
    unet.set_attn_processor(AttnProcessor())
    text_encoder.config._attn_implementation = "eager"
    scheduler = make_scheduler()
    shown = torch.tensor([i for i, p in enumerate(products) if p.background in BASE_BACKGROUNDS])
    captions = [p.caption(frame) for p in products for frame in FRAMES] + [""]
    input_ids = tokenize(tokenizer, captions)

    def measure_loss(generator):
        batch = shown[torch.randint(len(shown), (recipe.unet_batch_size,), generator=generator)]
        frames = torch.randint(len(FRAMES), batch.shape, generator=generator)
        dropped = torch.rand(batch.shape, generator=generator) < recipe.caption_dropout
        caption_index = torch.where(dropped, len(captions) - 1, batch * len(FRAMES) + frames)
        clean = latents[batch] * scaling_factor  # B 4 h w
        noise = torch.randn(clean.shape, generator=generator)
        timesteps = torch.randint(
            scheduler.config.num_train_timesteps, batch.shape, generator=generator
        )
        noisy_latents = scheduler.add_noise(clean, noise, timesteps).to(device)
        prompt_embeds = text_encoder(input_ids[caption_index].to(device)).last_hidden_state  # B L D
        noise_pred = unet(noisy_latents, timesteps.to(device), prompt_embeds).sample.float()
        error = (noise_pred - noise.to(device)).square().mean(dim=(1, 2, 3))
        snr = compute_snr(scheduler, timesteps)
        return (error * (snr.clamp(max=recipe.snr_gamma) / snr).to(device)).mean()

    train(
        {"text_encoder": text_encoder, "unet": unet},
        measure_loss,
        steps=recipe.unet_steps,
        learning_rate=recipe.unet_learning_rate,
        ema_decay=recipe.ema_decay,
        seed=recipe.seed,
        device=device,
        folder=folder,
        name="unet",
    )
    text_encoder.config._attn_implementation = "sdpa"
    return text_encoder.eval(), unet.eval()


def tokenize(tokenizer: CLIPTokenizer, captions: list[str]) -> torch.Tensor:
    """Token ids (N, 77), padded as the pipeline pads; equal captions are tokenized once."""
    unique = {caption: row for row, caption in enumerate(dict.fromkeys(captions))}
    batch = tokenizer(
        list(unique),
        padding="max_length",
        truncation=True,
        max_length=tokenizer.model_max_length,
        return_tensors="pt",
    )
    return batch.input_ids[[unique[caption] for caption in captions]]

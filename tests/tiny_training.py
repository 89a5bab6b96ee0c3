"""Tiny trainings: encoded images of random latents for the tiny pipeline, and quick settings."""

from dataclasses import replace

import torch

from sdkit.finetuning.config import LoRAConfig
from sdkit.finetuning.encoding import EncodedDataset

CAPTIONS = ("", "red boots", "blue shoes on grass", "white sneakers")


def make_encoded(pipe, count=24, *, seed=0, size=8):
    """Images that share one pattern, so that there is something to learn."""
    generator = torch.Generator().manual_seed(seed)
    input_ids = pipe.tokenizer(
        list(CAPTIONS), padding="max_length", truncation=True, return_tensors="pt"
    ).input_ids
    with torch.no_grad():
        prompt_embeds = pipe.text_encoder(input_ids)[0]
    pattern = torch.randn(1, 4, size, size, generator=torch.Generator().manual_seed(99))
    mean = 4 * pattern + torch.randn(count, 4, size, size, generator=generator)
    caption_index = torch.randint(1, len(CAPTIONS), (count,), generator=generator)
    return EncodedDataset(
        names=tuple(f"image_{i:03d}.png" for i in range(count)),
        captions=tuple(CAPTIONS[i] for i in caption_index),
        latent_mean=mean,
        latent_std=torch.full_like(mean, 0.1),
        flipped_mean=mean.flip(-1),
        flipped_std=torch.full_like(mean, 0.1),
        caption_index=caption_index,
        prompt_embeds=prompt_embeds,
        input_ids=input_ids,
        fingerprint=f"tiny-{count}-{seed}",
        scaling_factor=pipe.vae.config.scaling_factor,
    )


def spoil(encoded, index, value=float("nan")):
    """The data with one bad number in the latents of one image."""
    mean = encoded.latent_mean.clone()
    mean[index, 0, 0, 0] = value
    return replace(encoded, latent_mean=mean)


def make_data(pipe):
    return make_encoded(pipe), make_encoded(pipe, 6, seed=1)


def make_config(folder, **changes):
    quick = {
        "output_folder": folder, "backend": "cpu", "max_train_steps": 6, "learning_rate": 1e-3,
        "lr_warmup_steps": 1, "validation_steps": 3, "checkpointing_steps": 2,
    }  # fmt: skip
    return LoRAConfig(**{**quick, **changes})

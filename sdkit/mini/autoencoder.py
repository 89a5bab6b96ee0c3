"""Trains the bundled model's AutoencoderKL on renders of every background, white included."""

# B batch, C channels, H W pixels, h w latent

from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL
from tqdm.auto import tqdm

from sdkit.mini.recipe import Recipe, make_vae
from sdkit.mini.training import train

POLISH_NOISE = 0.03  # of the std of the latents: about what a denoised latent is off by
KL_WEIGHT = 2e-4  # on the mean over latent values: keeps them near unit scale


def train_vae(
    recipe: Recipe, images: np.ndarray, *, folder: Path, device: torch.device
) -> AutoencoderKL:
    """Trains the autoencoder, or continues.

    Args:
        recipe: Steps, batch size, rate.
        images: (N, H, W, 3) uint8.
        folder: For state and log.
        device: Where to train.

    Returns:
        The model with averaged weights, its `scaling_factor` set to one over the latents' std.
    """
    torch.manual_seed(recipe.seed)
    vae = make_vae().to(device)

    def measure_loss(generator):
        index = torch.randint(len(images), (recipe.vae_batch_size,), generator=generator)
        pixels = to_pixels(images[np.sort(index.numpy())]).to(device)  # B 3 H W
        posterior = vae.encode(pixels).latent_dist
        noise = torch.randn(posterior.mean.shape, generator=generator).to(device)
        decoded = vae.decode(posterior.mean + posterior.std * noise).sample.float()
        kl = 0.5 * (posterior.mean**2 + posterior.var - 1 - posterior.logvar).float().mean()
        return reconstruction_loss(decoded, pixels) + KL_WEIGHT * kl

    train(
        {"vae": vae},
        measure_loss,
        steps=recipe.vae_steps,
        learning_rate=recipe.vae_learning_rate,
        ema_decay=recipe.ema_decay,
        seed=recipe.seed,
        device=device,
        folder=folder,
        name="vae",
    )
    return vae.eval()


def polish_decoder(
    vae: AutoencoderKL,
    recipe: Recipe,
    images: np.ndarray,
    latents: torch.Tensor,
    *,
    folder: Path,
    device: torch.device,
) -> AutoencoderKL:
    """Trains the decoder on, in place, with the encoder and so the latents as they are.

    Args:
        vae: From `train_vae`.
        recipe: Steps, batch size.
        images: (N, H, W, 3) uint8.
        latents: Their posterior means, (N, 4, h, w).
        folder: For state and log.
        device: Where to train.
    """
    noise_scale = POLISH_NOISE * latents.std()

    def measure_loss(generator):
        index = torch.randint(len(images), (recipe.vae_batch_size,), generator=generator)
        index = index.sort().values
        noise = torch.randn(latents[index].shape, generator=generator)
        decoded = vae.decode((latents[index] + noise_scale * noise).to(device)).sample.float()
        return reconstruction_loss(decoded, to_pixels(images[index.numpy()]).to(device))

    train(
        {"decoder": vae.decoder, "post_quant_conv": vae.post_quant_conv},
        measure_loss,
        steps=recipe.decoder_steps,
        learning_rate=recipe.decoder_learning_rate,
        ema_decay=recipe.ema_decay,
        seed=recipe.seed + 2,
        device=device,
        folder=folder,
        name="decoder",
    )
    return vae.eval()


def reconstruction_loss(decoded: torch.Tensor, pixels: torch.Tensor) -> torch.Tensor:
    """L1 and L2 on the pixels and L1 on their differences, so that edges stay sharp."""
    error = decoded - pixels
    edges = error.diff(dim=2).abs().mean() + error.diff(dim=3).abs().mean()
    return error.abs().mean() + 2 * error.square().mean() + 0.5 * edges


def to_pixels(images: np.ndarray) -> torch.Tensor:
    """(B, H, W, 3) uint8 to (B, 3, H, W) float32 in [-1, 1]."""
    return torch.tensor(images).permute(0, 3, 1, 2).float() / 127.5 - 1


@torch.no_grad()
def encode_images(vae: AutoencoderKL, images: np.ndarray, *, device: torch.device) -> torch.Tensor:
    """Posterior mean of every image, (N, 4, h, w) float32, unscaled."""
    means = []
    for start in tqdm(range(0, len(images), 32), desc="latents", mininterval=5):
        with torch.autocast(device.type, torch.bfloat16):
            pixels = to_pixels(images[start : start + 32]).to(device)
            means.append(vae.encode(pixels).latent_dist.mean.float().cpu())
    return torch.cat(means).contiguous()

"""What the bundled model is: its sizes, its training data and its schedule, in one place."""

from dataclasses import dataclass

from diffusers import AutoencoderKL, PNDMScheduler, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from sdkit.mini.catalogue import SIZE_PIXELS


@dataclass(frozen=True)
class Recipe:
    """The build of the bundled model.

    Attributes:
        images: Rendered training pictures, all backgrounds; the denoiser leaves the white ones out.
        seed: Of renders, initial weights and batches.
        classifier_steps: Optimiser steps of the judge of catalogue pictures.
        vae_steps: Optimiser steps of the autoencoder.
        vae_batch_size: Pictures a step.
        vae_learning_rate: Peak, AdamW.
        decoder_steps: Optimiser steps of the decoder alone, afterwards.
        decoder_learning_rate: Peak, AdamW.
        unet_steps: Optimiser steps of text encoder and UNet together.
        unet_batch_size: Latents a step.
        unet_learning_rate: Peak, AdamW.
        caption_dropout: Share of empty captions, for classifier-free guidance.
        snr_gamma: Min-SNR weighting (Hang et al. 2023, arXiv 2303.09556).
        ema_decay: Of the weights that are shipped.
    """

    images: int = 12_288
    seed: int = 42
    classifier_steps: int = 700
    vae_steps: int = 2_800
    vae_batch_size: int = 8
    vae_learning_rate: float = 1.5e-3
    decoder_steps: int = 1_200
    decoder_learning_rate: float = 6e-4
    unet_steps: int = 7_000
    unet_batch_size: int = 32
    unet_learning_rate: float = 1e-3
    caption_dropout: float = 0.1
    snr_gamma: float = 5.0
    ema_decay: float = 0.999


def make_vae() -> AutoencoderKL:
    """SD 1.5's autoencoder, f8 with 4 latent channels, a sixteenth as wide."""
    return AutoencoderKL(
        block_out_channels=(16, 48, 96, 128),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        latent_channels=4,
        layers_per_block=1,
        norm_num_groups=8,
        sample_size=SIZE_PIXELS,
    )


def make_text_encoder(tokenizer: CLIPTokenizer) -> CLIPTextModel:
    """A CLIP text model of three small layers; 77 tokens as in SD 1.5."""
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=128,
            intermediate_size=512,
            projection_dim=128,
            num_hidden_layers=3,
            num_attention_heads=4,
            max_position_embeddings=77,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def make_unet() -> UNet2DConditionModel:
    """SD 1.5's UNet, one layer a block, cross-attention at both finer levels."""
    return UNet2DConditionModel(
        sample_size=SIZE_PIXELS // 8,
        block_out_channels=(64, 128, 144),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=128,
        attention_head_dim=4,  # diffusers' name for the number of heads, as SD 1.5 configures it
        norm_num_groups=16,
    )


def make_scheduler() -> PNDMScheduler:
    """The settings of SD 1.5's scheduler_config.json.

    PNDM itself knows no clip_sample; DDIM made from this configuration would clip the latents at 1.
    """
    scheduler = PNDMScheduler(
        num_train_timesteps=1000,
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        set_alpha_to_one=False,
        skip_prk_steps=True,
        steps_offset=1,
    )
    scheduler.register_to_config(clip_sample=False)
    return scheduler

"""Tiny pipelines of other kinds: without a prompt, with a movq, a ControlNet, frames of a video."""

import torch
from diffusers import (
    AnimateDiffPipeline,
    ControlNetModel,
    DDIMScheduler,
    DDPMPipeline,
    DDPMScheduler,
    KandinskyV22Pipeline,
    MotionAdapter,
    StableDiffusionControlNetPipeline,
    StableDiffusionXLImg2ImgPipeline,
    UNet2DConditionModel,
    UNet2DModel,
    VQModel,
)
from tiny_pipelines import build_tiny_pipe, build_tiny_xl_pipe

WIDTHS = (32, 64)


def quiet(pipe):
    pipe.set_progress_bar_config(disable=True)
    return pipe


def unconditional(tokenizer_folder, *, seed=0):
    """DDPM: pixels from noise, no prompt, no text encoder, no VAE."""
    torch.manual_seed(seed)
    unet = UNet2DModel(
        sample_size=32, block_out_channels=WIDTHS, layers_per_block=1, norm_num_groups=8,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
    )  # fmt: skip
    return quiet(DDPMPipeline(unet=unet, scheduler=DDPMScheduler()))


def kandinsky(tokenizer_folder, *, seed=0):
    """Image embeddings instead of a prompt, and a VAE that is called movq."""
    torch.manual_seed(seed)
    unet = UNet2DConditionModel(
        in_channels=4, out_channels=8, block_out_channels=WIDTHS, layers_per_block=1,
        down_block_types=("ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D"),
        mid_block_type="UNetMidBlock2DSimpleCrossAttn",
        up_block_types=("SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"),
        addition_embed_type="image", encoder_hid_dim=32, encoder_hid_dim_type="image_proj",
        cross_attention_dim=32, attention_head_dim=4, resnet_time_scale_shift="scale_shift",
    )  # fmt: skip
    movq = VQModel(
        block_out_channels=WIDTHS, layers_per_block=1, latent_channels=4, norm_num_groups=8,
        down_block_types=("DownEncoderBlock2D", "AttnDownEncoderBlock2D"),
        up_block_types=("AttnUpDecoderBlock2D", "UpDecoderBlock2D"),
        norm_type="spatial", num_vq_embeddings=12, vq_embed_dim=4,
    )  # fmt: skip
    scheduler = DDIMScheduler(clip_sample=False, set_alpha_to_one=False)
    return quiet(KandinskyV22Pipeline(unet=unet, scheduler=scheduler, movq=movq))


def embed_an_image(pipe):
    embeds = torch.randn(2, 32, generator=torch.Generator().manual_seed(0))
    return {
        "image_embeds": embeds[:1], "negative_image_embeds": embeds[1:],
        "height": 64, "width": 64,
    }  # fmt: skip


def controlled(tokenizer_folder, *, seed=0):
    """A ControlNet beside the UNet, which no guard watches."""
    components = build_tiny_pipe(tokenizer_folder, seed=seed).components
    controlnet = ControlNetModel(
        block_out_channels=WIDTHS, layers_per_block=1, cross_attention_dim=32,
        attention_head_dim=2, norm_num_groups=8,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        conditioning_embedding_out_channels=(16, 16, 32, 32),
    )  # fmt: skip
    return quiet(
        StableDiffusionControlNetPipeline(
            **components, controlnet=controlnet, requires_safety_checker=False
        )
    )


def give_edges(pipe):
    return {"image": torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))}


def give_edges_with_nan(pipe):
    edges = give_edges(pipe)
    edges["image"][0, 0, 3, 3] = float("nan")
    return edges


def animated(tokenizer_folder, *, seed=0):
    """Four frames; the output has frames and no images."""
    components = build_tiny_pipe(tokenizer_folder, seed=seed).components
    adapter = MotionAdapter(
        block_out_channels=WIDTHS, motion_layers_per_block=1, motion_norm_num_groups=2,
        motion_num_attention_heads=4,
    )  # fmt: skip
    parts = {name: components[name] for name in ("vae", "text_encoder", "tokenizer", "unet")}
    scheduler = DDIMScheduler(beta_schedule="linear", clip_sample=False)
    return quiet(AnimateDiffPipeline(**parts, scheduler=scheduler, motion_adapter=adapter))


def xl_image_to_image(tokenizer_folder, *, seed=0):
    components = build_tiny_xl_pipe(tokenizer_folder, seed=seed).components
    return quiet(StableDiffusionXLImg2ImgPipeline(**components, add_watermarker=False))

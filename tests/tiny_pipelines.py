"""Tiny pipelines of the real diffusers classes, random weights, offline: nothing is mocked."""

import json

import torch
from diffusers import (
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    PNDMScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from tokenizers import Tokenizer
from tokenizers.models import Unigram
from tokenizers.pre_tokenizers import Metaspace
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    T5Config,
    T5EncoderModel,
    T5TokenizerFast,
)

TINY_SIZE_PIXELS = 64
LETTERS = "abcdefghijklmnopqrstuvwxyz0123456789,.-'"


def write_tokenizer(folder):
    """A CLIP tokenizer that knows single letters only: two files, no download."""
    tokens = [*LETTERS, *(letter + "</w>" for letter in LETTERS)]
    tokens += ["<|startoftext|>", "<|endoftext|>"]
    (folder / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(tokens)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    return folder


def build_text_config(tokenizer):
    return CLIPTextConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, projection_dim=32,
        num_hidden_layers=2, num_attention_heads=2, max_position_embeddings=77,
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
    )  # fmt: skip


def build_vae(**config):
    return AutoencoderKL(
        block_out_channels=(16, 16, 32, 32), down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4, latent_channels=4, norm_num_groups=8,
        sample_size=TINY_SIZE_PIXELS, **config,
    )  # fmt: skip


def build_tiny_pipe(tokenizer_folder, *, seed=0):
    """Random weights, SD 1.5's classes, 2 heads, f8 VAE; healthy images of coloured noise."""
    torch.manual_seed(seed)
    tokenizer = CLIPTokenizer.from_pretrained(tokenizer_folder, model_max_length=77)
    unet = UNet2DConditionModel(
        sample_size=TINY_SIZE_PIXELS // 8, block_out_channels=(32, 64), layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=32, attention_head_dim=2, norm_num_groups=8,
    )  # fmt: skip
    vae = build_vae()
    scheduler = PNDMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear",
        skip_prk_steps=True, steps_offset=1,
    )  # fmt: skip
    pipe = StableDiffusionPipeline(
        vae=vae, text_encoder=CLIPTextModel(build_text_config(tokenizer)), tokenizer=tokenizer,
        unet=unet, scheduler=scheduler, safety_checker=None, feature_extractor=None,
        requires_safety_checker=False,
    )  # fmt: skip
    pipe.set_progress_bar_config(disable=True)
    return pipe


def build_tiny_xl_pipe(tokenizer_folder, *, seed=0):
    """Two text encoders, the second with hidden states and a pooled embedding."""
    base = build_tiny_pipe(tokenizer_folder, seed=seed)
    unet = UNet2DConditionModel(
        sample_size=TINY_SIZE_PIXELS // 8, block_out_channels=(32, 64), layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"), norm_num_groups=8,
        cross_attention_dim=64, attention_head_dim=2, addition_embed_type="text_time",
        addition_time_embed_dim=8, projection_class_embeddings_input_dim=6 * 8 + 32,
    )  # fmt: skip
    pipe = StableDiffusionXLPipeline(
        vae=base.vae, text_encoder=base.text_encoder, tokenizer=base.tokenizer,
        text_encoder_2=CLIPTextModelWithProjection(build_text_config(base.tokenizer)),
        tokenizer_2=base.tokenizer, unet=unet, scheduler=base.scheduler, add_watermarker=False,
    )  # fmt: skip
    pipe.set_progress_bar_config(disable=True)
    return pipe


def build_tiny_sd3_pipe(tokenizer_folder, *, seed=0):
    """A transformer instead of a UNet, flow matching, no T5 (diffusers puts zeros there)."""
    torch.manual_seed(seed)
    tokenizer = CLIPTokenizer.from_pretrained(tokenizer_folder, model_max_length=77)
    text_config = build_text_config(tokenizer)
    transformer = SD3Transformer2DModel(
        sample_size=TINY_SIZE_PIXELS // 8, patch_size=1, in_channels=4, out_channels=4,
        num_layers=1, attention_head_dim=8, num_attention_heads=4, caption_projection_dim=32,
        joint_attention_dim=64, pooled_projection_dim=64,
    )  # fmt: skip
    pipe = StableDiffusion3Pipeline(
        vae=build_vae(use_quant_conv=False, use_post_quant_conv=False, shift_factor=0.0609),
        text_encoder=CLIPTextModelWithProjection(text_config), tokenizer=tokenizer,
        text_encoder_2=CLIPTextModelWithProjection(text_config), tokenizer_2=tokenizer,
        text_encoder_3=None, tokenizer_3=None, transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
    )  # fmt: skip
    pipe.set_progress_bar_config(disable=True)
    return pipe


def build_tiny_flux_pipe(tokenizer_folder, *, seed=0):
    """Latents packed into tokens, guidance embedded, a T5 beside the CLIP text encoder."""
    torch.manual_seed(seed)
    tokenizer = CLIPTokenizer.from_pretrained(tokenizer_folder, model_max_length=77)
    words = ["<pad>", "</s>", "<unk>", "\u2581", *LETTERS]
    t5_tokens = Tokenizer(Unigram([(word, -1.0) for word in words], unk_id=2))
    t5_tokens.pre_tokenizer = Metaspace()
    t5_tokens.save(str(tokenizer_folder / "t5.json"))
    t5_config = T5Config(
        vocab_size=len(words), d_model=32, d_kv=16, d_ff=64, num_layers=1, num_heads=2,
        feed_forward_proj="gated-gelu",
    )  # fmt: skip
    transformer = FluxTransformer2DModel(
        in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=16,
        num_attention_heads=2, joint_attention_dim=32, pooled_projection_dim=32,
        guidance_embeds=True, axes_dims_rope=(4, 4, 8),
    )  # fmt: skip
    pipe = FluxPipeline(
        vae=build_vae(use_quant_conv=False, use_post_quant_conv=False, shift_factor=0.1159),
        text_encoder=CLIPTextModel(build_text_config(tokenizer)), tokenizer=tokenizer,
        text_encoder_2=T5EncoderModel(t5_config).eval(),  # it has dropout
        tokenizer_2=T5TokenizerFast(tokenizer_file=str(tokenizer_folder / "t5.json"), extra_ids=0),
        transformer=transformer, scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
    )  # fmt: skip
    pipe.set_progress_bar_config(disable=True)
    return pipe

"""The planted faults, each with its truth; `test_planted.py` proves the truths.

    for case in PLANTED:
        with case.build(tokenizer_folder) as (pipe, pipe_kwargs):
            pipe("a shoe", **pipe_kwargs)  # goes wrong where the case says

A step is the index of the denoising loop, as the guard counts it. PNDM makes four of three.
"""

from collections.abc import Callable
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass

import torch
from broken_attention import (
    MathProcessor,
    add_fresh_memory,
    divide_zero_by_zero,
    mask_all,
    mask_one_row,
    mask_one_row_of_a_softmax_by_hand,
    mask_with_the_least_float16,
    multiply_a_mask_by_infinity,
    scale_in_place,
    subtract_infinities,
    swallow_after,
    use,
    write_half_a_buffer,
)
from broken_kernels import at_call, at_step, documented, everything, kernel, once, one_element
from diffusers.models.attention_processor import AttnProcessor
from other_pipelines import (
    controlled,
    embed_an_image,
    give_edges,
    give_edges_with_nan,
    kandinsky,
    unconditional,
)
from planting import (
    CROSS_ATTENTION,
    HALF,
    INF,
    NAN,
    SELF_ATTENTION,
    SINGLE,
    TEXT,
    add_lora,
    add_safety_checker,
    ask_not_for_an_s,
    blind_the_clip_encoder,
    both,
    compile_the_unet,
    darken,
    drop_eps,
    end_betas_at_one,
    flush_the_decoders_input,
    flush_the_prediction,
    flush_the_prediction_at,
    give_an_image_with_nan,
    give_latents,
    give_negative_prompt_embeds,
    give_prompt_embeds,
    image_to_image,
    mark_norm,
    nothing,
    predict_the_sample,
    raise_lora_scale,
    raise_the_guidance_scale,
    scale_decoder_stream,
    scale_inside,
    scale_text_stream,
    scale_weights,
    set_weight,
    slice_attention,
    spoil_a_token,
    spoil_alphas,
    spoil_the_latents_in_a_callback,
    start_from_grey,
    with_ddim,
)
from tiny_pipelines import build_tiny_pipe, build_tiny_sd3_pipe, build_tiny_xl_pipe

from sdkit.emulate import float16_arithmetic, mps

RUN = {"num_inference_steps": 3}


@dataclass(frozen=True)
class Planted:
    """One fault and the truth about it.

    Attributes:
        name: What is broken, in words.
        plant: `plant(pipe)` spoils a pipeline and returns keyword arguments for its call, or None.
        stage: The component in whose call the first bad op runs; "none" if there is none.
        step: Index of the denoising loop; None outside of it.
        module: The innermost module that runs the first bad op.
        cause: A cause as `diagnose` names it.
        note: Why this is the truth.
        also: Another (step, module) that is as true.
        dtype: Of the whole pipeline.
        memory: What fresh memory holds on the emulated backend; None without such a backend.
        faults: `faults(pipe)`: broken kernels for the emulated backend.
        base: `base(tokenizer_folder)`: the healthy pipeline.
        prompts: What to ask for; none of a pipeline that takes no prompt.
        fast: Whether it belongs to the short campaign.
    """

    name: str
    plant: Callable
    stage: str
    step: int | None
    module: str | None
    cause: str
    note: str
    also: tuple = ()
    dtype: torch.dtype = HALF
    memory: str | None = None
    faults: Callable = lambda pipe: ()
    base: Callable = build_tiny_pipe
    prompts: tuple = ("a shoe",)
    fast: bool = False

    @contextmanager
    def build(self, tokenizer_folder):
        """Yields the spoilt pipeline and the arguments of its call, on the backend it needs."""
        pipe = self.base(tokenizer_folder)
        pipe.set_progress_bar_config(disable=True)
        pipe_kwargs = {**RUN, **(self.plant(pipe) or {})}
        pipe.to(self.dtype)
        faults = self.faults(pipe)
        if self.memory is not None or faults:
            backend = mps(self.memory or "zeros", faults)
        else:
            backend = float16_arithmetic() if self.dtype is HALF else nullcontext()
        with backend:
            yield pipe, pipe_kwargs


def draw_step(seed, *, first=1, last=5):
    """A step that nobody chose, the same each time."""
    return int(torch.randint(first, last + 1, (), generator=torch.Generator().manual_seed(seed)))


LATE = draw_step(1)
LATER = draw_step(2)
LAST = draw_step(3)

PLANTED = (
    # Range overflow
    Planted(
        "UNet conv1, exact scaling", scale_inside("unet.down_blocks.0.resnets.0", 2.0**17),
        "unet", 0, "unet.down_blocks.0.resnets.0.conv1", "range-overflow",
        "norm2 reads it alone, its eps scaled along: float32 is unchanged", fast=True,
    ),
    Planted(
        "UNet mid block conv1, exact scaling", scale_inside("unet.mid_block.resnets.1", 2.0**17),
        "unet", 0, "unet.mid_block.resnets.1.conv1", "range-overflow", "deep in the UNet",
    ),
    Planted(
        "UNet up block conv1, at a later step",
        both(with_ddim(), scale_inside("unet.up_blocks.1.resnets.0", 43200.0)),
        "unet", 2, "unet.up_blocks.1.resnets.0.conv1", "range-overflow",
        "at most 63,300 at steps 0 and 1, 67,700 at step 2",
    ),
    Planted(
        "VAE stream overflows in a residual sum", scale_decoder_stream(3120.0),
        "vae", None, "vae.decoder.up_blocks.0.resnets.1", "range-overflow",
        "both summands are finite, the sum in ResnetBlock2D.forward is not",
    ),
    Planted(
        "VAE decoder conv1, exact scaling",
        scale_inside("vae.decoder.up_blocks.2.resnets.1", 2.0**17),
        "vae", None, "vae.decoder.up_blocks.2.resnets.1.conv1", "range-overflow",
        "the decoder's norm2 undoes it in float32",
    ),
    Planted(
        "VAE encoder of image-to-image",
        both(scale_inside("vae.encoder.down_blocks.1.resnets.0", 2.0**18), start_from_grey),
        "vae", None, "vae.encoder.down_blocks.1.resnets.0.conv1", "range-overflow",
        "before the denoising loop", base=image_to_image,
    ),
    Planted(
        "text encoder stream", scale_text_stream(2.0**15),
        "text_encoder", None, TEXT + "encoder.layers.1", "range-overflow",
        "layer norms alone read the stream",
    ),
    Planted(
        "text encoder fc1, large weights",
        scale_weights(TEXT + "encoder.layers.1.mlp.fc1", by=2.0**17),
        "text_encoder", None, TEXT + "encoder.layers.1.mlp.fc1", "range-overflow",
        "weights of 17,000, each of them finite",
    ),
    Planted(
        "Q.K^T / sqrt(d) above 65504",
        both(
            use(AttnProcessor()),
            scale_weights(SELF_ATTENTION + ".to_q", SELF_ATTENTION + ".to_k", by=1000.0),
        ),
        "unet", 0, SELF_ATTENTION, "range-overflow",
        "an honest baddbmm: the scaled score itself does not fit", memory="zeros",
    ),
    Planted(
        "GEGLU's product",
        scale_weights("unet.up_blocks.1.attentions.0.transformer_blocks.0.ff.net.0.proj", by=2e3),
        "unet", 0, "unet.up_blocks.1.attentions.0.transformer_blocks.0.ff.net.0",
        "range-overflow", "both halves are finite, value * gelu(gate) is not",
    ),
    Planted(
        "a LoRA scale of 2^24", raise_lora_scale,
        "unet", 0, SELF_ATTENTION + ".to_q", "range-overflow",
        "the product with the scale is computed in the adapter's own layer",
    ),
    Planted(
        "transformer of Stable Diffusion 3",
        scale_weights("transformer.transformer_blocks.0.ff.net.0.proj", by=2.0**17),
        "unet", 0, "transformer.transformer_blocks.0.ff.net.0.proj", "range-overflow",
        "a transformer counts as the unet stage", base=build_tiny_sd3_pipe,
    ),
    Planted(
        "an in-place op in a user's processor", use(MathProcessor(scale_in_place), CROSS_ATTENTION),
        "unet", 0, CROSS_ATTENTION, "range-overflow", "mul_ writes over its own input",
    ),
    Planted(
        "a guidance scale of a million", raise_the_guidance_scale,
        "unet", 0, None, "range-overflow",
        "between two calls of the UNet, made after step 0 and fed at step 1; no module runs",
        also=((0, "unet"), (1, "unet"), (1, None)),
    ),
    # Uninitialised memory
    Planted(
        "slicing on memory full of NaN", slice_attention,
        "unet", 0, SELF_ATTENTION, "uninitialised-memory", "the report's leading candidate",
        memory="nan", faults=documented("baddbmm-beta-zero"), fast=True,
    ),
    Planted(
        "slicing on stale float32", slice_attention,
        "unet", 0, SELF_ATTENTION, "uninitialised-memory", "1.5 % of the values are not finite",
        memory="stale_float32", faults=documented("baddbmm-beta-zero"),
    ),
    Planted(
        "AttnProcessor in float32 on NaN", use(AttnProcessor()),
        "unet", 0, SELF_ATTENTION, "uninitialised-memory", "no slicing, no float16: one kernel",
        dtype=SINGLE, memory="nan", faults=documented("baddbmm-beta-zero"),
    ),
    Planted(
        "the VAE's attention alone", use(AttnProcessor(), "vae.decoder.mid_block.attentions.0"),
        "vae", None, "vae.decoder.mid_block.attentions.0", "uninitialised-memory",
        "the UNet keeps its fused attention",
        memory="nan", faults=documented("baddbmm-beta-zero"),
    ),
    Planted(
        "a user's processor reads torch.empty",
        use(MathProcessor(add_fresh_memory), CROSS_ATTENTION),
        "unet", 0, CROSS_ATTENTION, "uninitialised-memory",
        "an honest backend; the author meant zeros", memory="nan",
    ),
    Planted(
        "a user's processor writes half a buffer",
        use(MathProcessor(write_half_a_buffer), SELF_ATTENTION),
        "unet", 0, SELF_ATTENTION, "uninitialised-memory", "an in-place sum with the other half",
        memory="nan",
    ),
    # Backend faults
    Planted(
        "convolution, one element", nothing,
        "unet", 0, "unet.mid_block.resnets.0.conv1", "backend-fault", "one NaN",
        faults=kernel("aten.convolution", on="unet.mid_block.resnets.0.conv1"), fast=True,
    ),
    Planted(
        "convolution of the VAE, everything Inf", nothing,
        "vae", None, "vae.decoder.up_blocks.3.resnets.0.conv2", "backend-fault",
        "Inf is no overflow where float32 is small",
        faults=kernel(
            "aten.convolution", on="vae.decoder.up_blocks.3.resnets.0.conv2",
            spoil=everything(INF),
        ),
    ),
    Planted(
        "convolution in float32", nothing,
        "unet", 0, "unet.down_blocks.1.resnets.0.conv2", "backend-fault", "float32 is no cure",
        dtype=SINGLE, memory="zeros",
        faults=kernel("aten.convolution", on="unet.down_blocks.1.resnets.0.conv2"),
    ),
    Planted(
        "group norm, everything", nothing,
        "unet", 0, "unet.up_blocks.0.resnets.0.norm1", "backend-fault", "the whole tensor",
        faults=kernel(
            "aten.native_group_norm", on="unet.up_blocks.0.resnets.0.norm1", spoil=everything()
        ),
    ),
    Planted(
        "addmm, one -Inf", nothing,
        "unet", 0, "unet.time_embedding.linear_2", "backend-fault", "-Inf, and no mask",
        faults=kernel("aten.addmm", on="unet.time_embedding.linear_2", spoil=one_element(-INF)),
    ),
    Planted(
        "SiLU at one shape", nothing,
        "vae", None, "vae.decoder.up_blocks.3.resnets.0.nonlinearity", "backend-fault",
        "16 channels at 64 pixels come first behind norm2 of this block",
        faults=kernel("aten.silu", shape=(1, 16, 64, 64)),
    ),
    Planted(
        "fused attention", nothing,
        "unet", 0, SELF_ATTENTION, "backend-fault", "one element of what SDPA returns",
        faults=kernel("aten._scaled_dot_product_flash_attention_for_cpu", shape=(2, 2, 64, 16)),
    ),
    Planted(
        "softmax, one element", use(AttnProcessor()),
        "unet", 0, SELF_ATTENTION, "backend-fault", "an honest baddbmm before it",
        faults=kernel("aten._softmax", shape=(4, 64, 64)),
    ),
    Planted(
        "layer norm of the text encoder", mark_norm(TEXT + "final_layer_norm"),
        "text_encoder", None, TEXT + "final_layer_norm", "backend-fault", "one element",
        faults=kernel("aten.native_layer_norm", on=TEXT + "final_layer_norm"),
    ),
    Planted(
        "scores rounded before the scale",
        both(
            use(AttnProcessor()),
            scale_weights(SELF_ATTENTION + ".to_q", SELF_ATTENTION + ".to_k", by=180.0),
        ),
        "unet", 0, SELF_ATTENTION, "backend-fault",
        "the scaled score fits, the backend's way to it does not",
        memory="zeros", faults=documented("score-rounding"),
    ),
    Planted(
        "a step drawn by lot, one element", with_ddim(),
        "unet", LATE, "unet.conv_out", "backend-fault",
        "told by the timestep: made again, the step is bad again",
        faults=kernel("aten.convolution", on="unet.conv_out", when=at_step(LATE)), fast=True,
    ),
    Planted(
        "a step drawn by lot, everything",
        both(with_ddim(), mark_norm("unet.up_blocks.1.resnets.1.norm2")),
        "unet", LATER, "unet.up_blocks.1.resnets.1.norm2", "backend-fault",
        "told by the timestep",
        faults=kernel(
            "aten.native_group_norm", on="unet.up_blocks.1.resnets.1.norm2",
            spoil=everything(), when=at_step(LATER),
        ),
    ),
    Planted(
        "a call drawn by lot", with_ddim(),
        "unet", LAST, "unet.mid_block.resnets.1.conv2", "backend-fault",
        "counted from the run's start: the step alone is clean, the whole run is bad again",
        faults=kernel(
            "aten.convolution", on="unet.mid_block.resnets.1.conv2", when=at_call(LAST)
        ),
    ),
    Planted(
        "once and never again", with_ddim(),
        "unet", 0, "unet.up_blocks.0.resnets.0.conv1", "backend-fault",
        "no replay shows it; the module's output did",
        faults=kernel("aten.convolution", on="unet.up_blocks.0.resnets.0.conv1", when=once),
    ),
    Planted(
        "once and never again, in the VAE", nothing,
        "vae", None, "vae.decoder.up_blocks.3.resnets.0.nonlinearity", "backend-fault",
        "no replay shows it; the module's output did",
        faults=kernel("aten.silu", shape=(1, 16, 64, 64), when=once),
    ),
    Planted(
        "interpolation", nothing,
        "unet", 0, "unet.up_blocks.0.upsamplers.0", "backend-fault",
        "a function in Upsample2D.forward",
        faults=kernel("aten.upsample_nearest2d"),
    ),
    Planted(
        "concatenation of a skip", nothing,
        "unet", 0, "unet.up_blocks.1", "backend-fault", "a function in the block's own forward",
        faults=kernel("aten.cat", shape=(2, 96, 8, 8)),
    ),
    Planted(
        "the cast of the time embedding", nothing,
        "unet", 0, "unet", "backend-fault", "a function in the UNet's own forward",
        faults=kernel("aten._to_copy", shape=(2, 32)),
    ),
    # Bad weights
    Planted(
        "a NaN weight in the UNet", set_weight("unet.down_blocks.1.resnets.0.conv1", NAN, index=7),
        "unet", 0, "unet.down_blocks.1.resnets.0.conv1", "bad-weights", "one of 18,432", fast=True,
    ),
    Planted(
        "a weight that overflows in the cast",
        set_weight("unet.up_blocks.0.resnets.1.conv2", 70000.0),
        "unet", 0, "unet.up_blocks.0.resnets.1.conv2", "bad-weights",
        "70000 in float32, Inf in float16",
    ),
    Planted(
        "a weight that overflows to -Inf in the cast",
        set_weight("vae.decoder.up_blocks.1.resnets.0.conv1", -70000.0),
        "vae", None, "vae.decoder.up_blocks.1.resnets.0.conv1", "bad-weights",
        "-Inf in a weight is no mask",
    ),
    Planted(
        "a NaN bias in the VAE", set_weight("vae.post_quant_conv", NAN, name="bias"),
        "vae", None, "vae.post_quant_conv", "bad-weights", "one of four",
    ),
    Planted(
        "an Inf norm weight in the text encoder", set_weight(TEXT + "final_layer_norm", INF),
        "text_encoder", None, TEXT + "final_layer_norm", "bad-weights", "one of 32",
    ),
    Planted(
        "a NaN weight in SDXL's second text encoder",
        set_weight("text_encoder_2.text_projection", NAN),
        "text_encoder", None, "text_encoder_2.text_projection", "bad-weights",
        "it spoils the pooled embedding alone", base=build_tiny_xl_pipe,
    ),
    Planted(
        "a NaN in a LoRA adapter",
        both(add_lora, set_weight(CROSS_ATTENTION + ".to_v.lora_A.default", NAN)),
        "unet", 0, CROSS_ATTENTION + ".to_v.lora_A.default", "bad-weights",
        "the base weights are clean",
    ),
    Planted(
        "one NaN in the token table", spoil_a_token,
        "text_encoder", None, TEXT + "embeddings.token_embedding", "bad-weights",
        "the prompt has the token, the empty one has not",
    ),
    Planted(
        "one NaN in the token table, for the negative prompt", ask_not_for_an_s,
        "text_encoder", None, TEXT + "embeddings.token_embedding", "bad-weights",
        "the negative prompt has the token, the prompt has not", prompts=("a hat",),
    ),
    Planted(
        "a NaN in a ControlNet",
        both(set_weight("controlnet.mid_block.resnets.0.conv1", NAN), give_edges),
        "unet", 0, "controlnet.mid_block.resnets.0.conv1", "bad-weights",
        "no guard is on it; the UNet is fed what it made", dtype=SINGLE, base=controlled,
    ),
    Planted(
        "a NaN in Kandinsky's movq",
        both(set_weight("movq.decoder.mid_block.resnets.0.conv1", NAN), embed_an_image),
        "vae", None, "movq.decoder.mid_block.resnets.0.conv1", "bad-weights",
        "a VAE of another name, in a pipeline without a prompt", dtype=SINGLE, base=kandinsky,
        prompts=(),
    ),
    Planted(
        "a NaN in an unconditional UNet", set_weight("unet.up_blocks.0.resnets.0.conv1", NAN),
        "unet", 0, "unet.up_blocks.0.resnets.0.conv1", "bad-weights",
        "no prompt, no text encoder, no VAE", dtype=SINGLE, base=unconditional,
        prompts=(),
    ),
    Planted(
        "a bad weight behind a harmless Inf",
        both(
            use(MathProcessor(mask_with_the_least_float16), SELF_ATTENTION),
            set_weight("unet.mid_block.resnets.1.conv2", NAN),
        ),
        "unet", 0, "unet.mid_block.resnets.1.conv2", "bad-weights",
        "-65504 - 32 rounds to -inf and masks a key, as was meant: no NaN comes of it",
    ),
    Planted(
        "a NaN weight in a compiled UNet",
        both(compile_the_unet, set_weight("unet.down_blocks.1.resnets.0.conv1", NAN)),
        "unet", 0, "unet.down_blocks.1.resnets.0.conv1", "bad-weights",
        "compiled in place, by the backend that changes nothing", dtype=SINGLE,
    ),
    # Bad input
    Planted(
        "latents with one NaN", give_latents,
        "unet", 0, "unet", "bad-input", "one of 256", fast=True,
    ),
    Planted(
        "prompt_embeds with one NaN", give_prompt_embeds,
        "unet", 0, "unet", "bad-input", "no text encoder runs",
    ),
    Planted(
        "negative_prompt_embeds of Inf", give_negative_prompt_embeds,
        "unet", 0, "unet", "bad-input", "the prompt itself is fine",
    ),
    Planted(
        "a callback that spoils the latents", spoil_the_latents_in_a_callback,
        "unet", 1, None, "bad-input", "made after step 1, fed at step 2; no module runs",
        also=((2, "unet"), (2, None), (1, "unet")),
    ),
    Planted(
        "one NaN in DDIM's alphas", spoil_alphas(2),
        "unet", 2, "unet", "bad-input",
        "step 1 reads it as the previous alpha, step 2 is fed what comes of it",
        also=((1, "unet"), (1, None), (2, None)),
    ),
    Planted(
        "Euler's first sigma is infinite", end_betas_at_one,
        "unet", 0, "unet", "bad-input", "betas that end at 1, trailing timesteps",
        also=((0, None),), dtype=SINGLE,
    ),
    Planted(
        "an image with one NaN", give_an_image_with_nan,
        "vae", None, "vae", "bad-input", "image-to-image encodes it", also=((None, "vae.encoder"),),
        base=image_to_image,
    ),
    Planted(
        "a ControlNet's image with one NaN", give_edges_with_nan,
        "unet", 0, "controlnet", "bad-input",
        "no guard is on it; what it makes of its image is bad, and not its fault",
        dtype=SINGLE, base=controlled,
    ),
    # Masks
    Planted(
        "one masked row in a user's processor", use(MathProcessor(mask_one_row), SELF_ATTENTION),
        "unet", 0, SELF_ATTENTION, "masked-softmax", "finite scores plus a row of -inf", fast=True,
    ),
    Planted(
        "one masked row of a softmax by hand",
        use(MathProcessor(mask_one_row_of_a_softmax_by_hand), SELF_ATTENTION),
        "unet", 0, SELF_ATTENTION, "masked-softmax", "-inf - -inf before any softmax runs",
    ),
    Planted(
        "everything masked in cross attention", use(MathProcessor(mask_all), CROSS_ATTENTION),
        "unet", 0, CROSS_ATTENTION, "masked-softmax", "masked_fill, in float32", dtype=SINGLE,
    ),
    Planted(
        "a masked row in the text encoder", blind_the_clip_encoder,
        "text_encoder", None, TEXT + "encoder.layers.1.self_attn", "masked-softmax",
        "the other rows have a causal mask of -inf, which is no fault",
    ),
    # Invalid arithmetic
    Planted(
        "Inf - Inf in a user's processor", use(MathProcessor(subtract_infinities), SELF_ATTENTION),
        "unet", 0, SELF_ATTENTION, "invalid-arithmetic", "in float32 too",
    ),
    Planted(
        "0/0 in a user's processor", use(MathProcessor(divide_zero_by_zero), CROSS_ATTENTION),
        "unet", 0, CROSS_ATTENTION, "invalid-arithmetic", "in float32 too", fast=True,
    ),
    Planted(
        "a mask times -inf in a user's processor",
        use(MathProcessor(multiply_a_mask_by_infinity), CROSS_ATTENTION),
        "unet", 0, CROSS_ATTENTION, "invalid-arithmetic", "0 * -inf where nothing is masked",
    ),
    Planted(
        "a norm without eps on a constant",
        both(
            scale_weights("vae.decoder.mid_block.resnets.1.conv1", by=0.0),
            drop_eps("vae.decoder.mid_block.resnets.1.norm2"),
        ),
        "vae", None, "vae.decoder.mid_block.resnets.1.norm2", "invalid-arithmetic",
        "0 * 1/sqrt(0)", dtype=SINGLE,
    ),
    # Hidden
    Planted(
        "an overflow that the VAE swallows",
        both(
            scale_inside("vae.decoder.up_blocks.3.resnets.1", 2.0**17),
            swallow_after("vae.decoder.conv_norm_out"),
        ),
        "vae", None, "vae.decoder.up_blocks.3.resnets.1.conv1", "hidden-nan",
        "the image is flat and nothing warns", fast=True,
    ),
    Planted(
        "a bad weight that the VAE swallows",
        both(
            set_weight("vae.decoder.up_blocks.1.resnets.0.norm1", NAN),
            swallow_after("vae.decoder.conv_norm_out"),
        ),
        "vae", None, "vae.decoder.up_blocks.1.resnets.0.norm1", "hidden-nan",
        "the image is flat and nothing warns",
    ),
    Planted(
        "an overflow that the UNet swallows",
        both(
            scale_inside("unet.mid_block.resnets.0", 2.0**17),
            swallow_after("unet.conv_norm_out"),
            predict_the_sample,
        ),
        "unet", 0, "unet.mid_block.resnets.0.conv1", "hidden-nan",
        "the UNet predicts the sample itself, and predicts zeros",
    ),
    # Safety checker
    Planted(
        "a safety checker that flags everything", add_safety_checker(-2.0),
        "safety_checker", None, "safety_checker", "safety-checker",
        "exact zeros, flagged, nothing is NaN", also=((None, None),), fast=True,
    ),
    # Underflow
    Planted(
        "the decoder's input flushes to zero", flush_the_decoders_input,
        "vae", None, "vae.decoder.conv_in", "underflow",
        "float32 keeps 2^-31 and shows a picture", fast=True,
    ),
    Planted(
        "the UNet's prediction flushes to zero", flush_the_prediction,
        "unet", 0, "unet.conv_out", "underflow",
        "the UNet predicts the sample itself, the VAE amplifies it: zeros make a flat picture",
    ),
    Planted(
        "the UNet's prediction flushes to zero at the last step", flush_the_prediction_at(2),
        "unet", 2, "unet.conv_out", "underflow", "the earlier steps keep their numbers",
    ),
    # No fault
    Planted(
        "an honestly dark picture", darken,
        "none", None, None, "dark-but-valid", "the same in float32", fast=True,
    ),
)  # fmt: skip

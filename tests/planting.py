"""How a fault is planted in a tiny pipeline: exact scaling, bad values, inputs, schedulers.

Every plant is a function of the pipeline; what it returns goes to the pipeline's call.
"""

import inspect

import numpy as np
import torch
import transformers
from diffusers import DDIMScheduler, EulerDiscreteScheduler, StableDiffusionImg2ImgPipeline
from diffusers.models.attention_processor import Attention
from diffusers.models.resnet import ResnetBlock2D
from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker
from peft import LoraConfig
from tiny_pipelines import build_tiny_pipe
from torch import nn
from transformers import CLIPConfig, CLIPTextConfig, CLIPVisionConfig

NAN, INF = float("nan"), float("inf")
HALF, SINGLE = torch.float16, torch.float32
# transformers 5 dropped the level between CLIPTextModel and its encoder.
TEXT = "text_encoder." + "text_model." * transformers.__version__.startswith("4.")
SELF_ATTENTION = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1"
CROSS_ATTENTION = "unet.up_blocks.1.attentions.1.transformer_blocks.0.attn2"


def draw(pipe, prompts=("a shoe",), *, seed=0, **pipe_kwargs):
    """Calls a pipeline: (images or frames, whether the safety checker flagged one)."""
    takes_words = "prompt" in inspect.signature(pipe.__call__).parameters
    if takes_words and "prompt_embeds" not in pipe_kwargs:
        pipe_kwargs = {"prompt": list(prompts), **pipe_kwargs}
    generator = torch.Generator("cpu").manual_seed(seed)
    output = pipe(generator=generator, output_type="np", **pipe_kwargs)
    images = getattr(output, "images", getattr(output, "frames", None))
    images = images.reshape(-1, *images.shape[-3:])
    return images, any(getattr(output, "nsfw_content_detected", None) or [False])


def find_module(pipe, path):
    """The module at a dotted path from the pipeline."""
    component, _, inner = path.partition(".")
    return getattr(pipe, component).get_submodule(inner)


def scale(modules, factor):
    """Multiply weights and biases."""
    with torch.no_grad():
        for module in modules:
            for parameter in module.parameters():
                parameter *= factor


def scale_inside(path, factor):
    """Scale what a ResNet writes between its norms, and norm2's eps: float32 is unchanged."""

    def plant(pipe):
        resnet = find_module(pipe, path)
        scale([m for m in (resnet.conv1, resnet.time_emb_proj) if m is not None], factor)
        resnet.norm2.eps *= factor**2

    return plant


def scale_decoder_stream(factor):
    """Scale the VAE decoder's residual stream, which norms alone read: float32 is unchanged."""

    def plant(pipe):
        decoder = pipe.vae.decoder
        writers, readers, passed_on = [decoder.conv_in], [decoder.conv_norm_out], []
        for name, module in decoder.named_modules():
            if isinstance(module, ResnetBlock2D):
                writers.append(module.conv2)
                readers.append(module.norm1)
            elif isinstance(module, Attention):
                writers.append(module.to_out[0])
                readers.append(module.group_norm)
            elif name.endswith(("conv_shortcut", "upsamplers.0.conv")):
                passed_on.append(module)
        scale(writers, factor)
        with torch.no_grad():
            for module in passed_on:
                module.bias *= factor
        for norm in readers:
            norm.eps *= factor**2

    return plant


def scale_text_stream(factor):
    """Scale the text encoder's residual stream, which layer norms alone read."""

    def plant(pipe):
        writers, norms = [], []
        for name, module in pipe.text_encoder.named_modules():
            if name.endswith(("_embedding", "out_proj", "fc2")):
                writers.append(module)
            elif isinstance(module, nn.LayerNorm):
                norms.append(module)
        scale(writers, factor)
        for norm in norms:
            norm.eps *= factor**2

    return plant


def scale_weights(*paths, by):
    """Plain large weights."""

    def plant(pipe):
        scale([find_module(pipe, path) for path in paths], by)

    return plant


def set_weight(path, value, *, index=0, name="weight"):
    """One bad value in one parameter."""

    def plant(pipe):
        with torch.no_grad():
            getattr(find_module(pipe, path), name).view(-1)[index] = value

    return plant


def mark_norm(path):
    """Give a norm weights of its own: at first all norms of a width have the same, ones."""

    def plant(pipe):
        weight = find_module(pipe, path).weight
        noise = torch.randn(weight.shape, generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            weight += 0.05 * noise

    return plant


def both(*plants):
    """Plant several; the last one's keyword arguments go to the pipeline."""

    def plant(pipe):
        pipe_kwargs = {}
        for one in plants:
            pipe_kwargs |= one(pipe) or {}
        return pipe_kwargs

    return plant


def nothing(pipe):
    """Leave the pipeline as it is: the fault is in a kernel."""


def slice_attention(pipe):
    pipe.enable_attention_slicing("max")


def with_ddim(*, steps=6, **config):
    """DDIM: every timestep is one step."""

    def plant(pipe):
        pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config, **config)
        return {"num_inference_steps": steps}

    return plant


def image_to_image(tokenizer_folder, *, seed=0):
    """The tiny pipeline with an image to start from."""
    components = build_tiny_pipe(tokenizer_folder, seed=seed).components
    pipe = StableDiffusionImg2ImgPipeline(**components, requires_safety_checker=False)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def start_from_grey(pipe):
    return {
        "image": np.full((1, 64, 64, 3), 0.4, np.float32),
        "strength": 0.8,
        "num_inference_steps": 5,
    }


def add_lora(pipe):
    """An adapter on to_q and to_v that was trained a little."""
    torch.manual_seed(1)
    pipe.unet.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_v"]))
    with torch.no_grad():
        for name, parameter in pipe.unet.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)


def raise_lora_scale(pipe):
    """An adapter merged with a scale that somebody mistyped."""
    add_lora(pipe)
    find_module(pipe, SELF_ATTENTION + ".to_q").scaling["default"] = 2.0**24


def give_latents(pipe):
    latents = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    latents[0, 2, 3, 4] = NAN
    return {"latents": latents.to(HALF)}


def give_prompt_embeds(pipe):
    prompt_embeds = torch.zeros(1, 77, 32, dtype=HALF)
    prompt_embeds[0, 5, 7] = NAN
    return {
        "prompt_embeds": prompt_embeds,
        "negative_prompt_embeds": torch.zeros_like(prompt_embeds),
    }


def give_negative_prompt_embeds(pipe):
    return {"negative_prompt_embeds": torch.full((1, 77, 32), INF, dtype=HALF)}


def spoil_alphas(step):
    """One bad value in DDIM's table."""

    def plant(pipe):
        pipe_kwargs = with_ddim()(pipe)
        pipe.scheduler.set_timesteps(6)
        pipe.scheduler.alphas_cumprod[pipe.scheduler.timesteps[step]] = NAN
        return pipe_kwargs

    return plant


def end_betas_at_one(pipe):
    """Zero terminal signal-to-noise: Euler's first sigma is infinite."""
    betas = torch.linspace(0.0001, 0.02, 1000)
    betas[-1] = 1.0
    pipe.scheduler = EulerDiscreteScheduler(
        trained_betas=betas.tolist(), timestep_spacing="trailing"
    )


def build_safety_checker():
    """The real class, so small that its features say nothing; its thresholds decide."""
    config = CLIPConfig(
        text_config=CLIPTextConfig(
            hidden_size=8, num_hidden_layers=1, num_attention_heads=1
        ).to_dict(),
        vision_config=CLIPVisionConfig(
            hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1,
            image_size=32, patch_size=16,
        ).to_dict(),
        projection_dim=8,
    )  # fmt: skip
    torch.manual_seed(0)
    return StableDiffusionSafetyChecker(config).eval()


def add_safety_checker(threshold):
    """A checker that flags what is more similar to its concepts than `threshold`: -2 is all."""

    def plant(pipe):
        from transformers.models.clip import CLIPImageProcessor

        pipe.safety_checker = build_safety_checker()
        with torch.no_grad():
            pipe.safety_checker.concept_embeds_weights.fill_(threshold)
        pipe.feature_extractor = CLIPImageProcessor(
            size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}
        )
        pipe.register_to_config(requires_safety_checker=True)

    return plant


def zero_biases(path):
    """So that an input of zeros makes an output of zeros."""

    def plant(pipe):
        with torch.no_grad():
            for name, parameter in find_module(pipe, path).named_parameters():
                if name.endswith("bias"):
                    parameter.zero_()

    return plant


def darken(pipe):
    """A picture of a dark room: every value near the lower end, with structure."""
    with torch.no_grad():
        pipe.vae.decoder.conv_out.weight *= 0.1
        pipe.vae.decoder.conv_out.bias.fill_(-0.93)


def blind_the_clip_encoder(pipe):
    """Every key of one query is masked with -inf, where the tokenizer would never do so."""
    pipe.text_encoder.set_attn_implementation("eager")

    def mask(module, args, kwargs):
        hidden_states = args[0] if args else kwargs["hidden_states"]
        length = hidden_states.shape[1]
        no = torch.full((length, length), -INF, dtype=hidden_states.dtype).triu(1)
        no[4] = -INF
        return args, {**kwargs, "attention_mask": no.expand(len(hidden_states), 1, -1, -1)}

    attention = find_module(pipe, TEXT + "encoder.layers.1.self_attn")
    attention.register_forward_pre_hook(mask, with_kwargs=True)


def drop_eps(path):
    """A norm whose author believed that no input is constant."""

    def plant(pipe):
        find_module(pipe, path).eps = 0.0

    return plant


def flush_the_decoders_input(pipe):
    """Two factors that float16 holds, and a product that it does not; norm1 undoes both."""
    both(
        zero_biases("vae"),
        scale_weights("vae.post_quant_conv", by=2.0**-15),
        scale_weights("vae.decoder.conv_in", by=2.0**-16),
    )(pipe)
    pipe.vae.decoder.mid_block.resnets[0].norm1.eps *= 4.0**-31


def flush_the_prediction(pipe):
    """Two factors that float16 holds, and a product that it does not; the VAE undoes both."""
    pipe_kwargs = with_ddim(steps=3, prediction_type="sample", clip_sample=False)(pipe)
    both(
        zero_biases("vae"),
        zero_biases("unet.conv_out"),
        scale_weights("unet.conv_norm_out", by=2.0**-12),
        scale_weights("unet.conv_out", by=2.0**-14),
        scale_weights("vae.post_quant_conv", by=2.0**14),
        scale_weights("vae.decoder.conv_in", by=2.0**13),
    )(pipe)
    return pipe_kwargs


def flush_the_prediction_at(step):
    """As `flush_the_prediction`, but the second factor comes at one timestep alone."""

    def plant(pipe):
        pipe_kwargs = flush_the_prediction(pipe)
        scale([pipe.unet.conv_norm_out], 2.0**12)
        pipe.scheduler.set_timesteps(pipe_kwargs["num_inference_steps"])
        timestep, now = float(pipe.scheduler.timesteps[step]), [None]

        def note(module, args, kwargs):
            now[0] = float(args[1])

        def damp(module, args, output):
            return output * 2.0**-12 if now[0] == timestep else output

        pipe.unet.register_forward_pre_hook(note, with_kwargs=True)
        pipe.unet.conv_norm_out.register_forward_hook(damp)
        return pipe_kwargs

    return plant


def predict_the_sample(pipe):
    """The UNet's last output is what the VAE is given; zeros make a flat picture."""
    both(zero_biases("vae"), zero_biases("unet.conv_out"))(pipe)
    return with_ddim(steps=3, prediction_type="sample", clip_sample=False)(pipe)


def give_an_image_with_nan(pipe):
    pipe_kwargs = start_from_grey(pipe)
    pipe_kwargs["image"][0, 10, 20, 1] = NAN
    return pipe_kwargs


def raise_the_guidance_scale(pipe):
    return {"guidance_scale": 1e6}


def spoil_a_token(pipe):
    """The letter s, which "a shoe" has."""
    token = pipe.tokenizer.convert_tokens_to_ids("s")
    embedding = find_module(pipe, TEXT + "embeddings.token_embedding")
    with torch.no_grad():
        embedding.weight[token, 3] = NAN


def spoil_the_latents_in_a_callback(pipe):
    """The caller's own code between two steps."""

    def spoil(pipe, step, timestep, given):
        return given | ({"latents": given["latents"] * NAN} if step == 1 else {})

    return with_ddim()(pipe) | {"callback_on_step_end": spoil}


def ask_not_for_an_s(pipe):
    """The spoilt token is in the negative prompt alone."""
    spoil_a_token(pipe)
    return {"negative_prompt": ["shoe"]}


def compile_the_unet(pipe):
    pipe.unet.compile(backend="eager")

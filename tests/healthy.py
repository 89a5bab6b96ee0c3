"""Healthy runs of every kind that a diagnosis must leave in peace; `test_healthy.py` proves them.

for case in HEALTHY:
    with case.build(tokenizer_folder) as (pipe, pipe_kwargs):
        pipe(list(case.prompts), generator=generator, **pipe_kwargs)
"""

from collections.abc import Callable
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass

import numpy as np
import torch
from broken_attention import MathProcessor, use
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DEISMultistepScheduler,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    HeunDiscreteScheduler,
    KDPM2DiscreteScheduler,
    LCMScheduler,
    PNDMScheduler,
    StableDiffusionInpaintPipeline,
    UniPCMultistepScheduler,
)
from diffusers.models.attention_processor import AttnProcessor
from other_pipelines import (
    animated,
    controlled,
    embed_an_image,
    give_edges,
    kandinsky,
    unconditional,
    xl_image_to_image,
)
from planting import (
    HALF,
    INF,
    SINGLE,
    TEXT,
    add_lora,
    add_safety_checker,
    both,
    find_module,
    image_to_image,
    nothing,
    start_from_grey,
)
from tiny_pipelines import build_tiny_pipe, build_tiny_sd3_pipe, build_tiny_xl_pipe

from sdkit.emulate import float16_arithmetic, mps

BRAIN = torch.bfloat16
DTYPES = (SINGLE, HALF, BRAIN)
PROMPTS = (
    "a shoe",
    "",
    "a very long prompt, " * 12,
    "0123456789 .-'",
)


@dataclass(frozen=True)
class Healthy:
    """One run with nothing wrong.

    Attributes:
        name: What is run, in words.
        prepare: `prepare(pipe)` sets the pipeline up; may return arguments for its call.
        base: `base(tokenizer_folder)`: the pipeline.
        dtype: Of the whole pipeline; float16 is emulated.
        memory: What fresh memory holds on an honest emulated backend; None without one.
        prompts: What to ask for.
        seed: Of the noise.
        weights_seed: Of the weights.
        fast: Whether it belongs to the short campaign.
    """

    name: str
    prepare: Callable = nothing
    base: Callable = build_tiny_pipe
    dtype: torch.dtype = SINGLE
    memory: str | None = None
    prompts: tuple = ("a shoe",)
    seed: int = 0
    weights_seed: int = 0
    fast: bool = False

    @contextmanager
    def build(self, tokenizer_folder):
        """Yields the pipeline and the arguments of its call, on the backend it needs."""
        pipe = self.base(tokenizer_folder, seed=self.weights_seed)
        pipe_kwargs = {"num_inference_steps": 3, **(self.prepare(pipe) or {})}
        pipe.to(self.dtype)
        if self.memory is not None:
            backend = mps(self.memory, faults=())
        else:
            backend = float16_arithmetic() if self.dtype is HALF else nullcontext()
        with backend:
            yield pipe, pipe_kwargs


def with_scheduler(scheduler, *, steps=3, guidance_scale=7.5, **config):
    def prepare(pipe):
        pipe.scheduler = scheduler.from_config(pipe.scheduler.config, **config)
        return {"num_inference_steps": steps, "guidance_scale": guidance_scale}

    return prepare


def call_with(**pipe_kwargs):
    return lambda pipe: pipe_kwargs


def slice_attention(pipe):
    pipe.enable_attention_slicing("max")


def slice_and_tile_the_vae(pipe):
    pipe.vae.enable_slicing()
    pipe.vae.enable_tiling()
    pipe.vae.tile_latent_min_size, pipe.vae.tile_sample_min_size = 4, 32


def inpaint(tokenizer_folder, *, seed=0):
    components = build_tiny_pipe(tokenizer_folder, seed=seed).components
    pipe = StableDiffusionInpaintPipeline(**components, requires_safety_checker=False)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def paint_the_middle(pipe):
    mask_image = np.zeros((1, 64, 64, 1), np.float32)
    mask_image[:, 16:48, 16:48] = 1
    return start_from_grey(pipe) | {
        "mask_image": mask_image, "strength": 1.0, "height": 64, "width": 64,
        "num_inference_steps": 3,
    }  # fmt: skip


def mask_causally_with_inf(pipe):
    """The mask of a decoder as many write it: -inf above the diagonal; no row is all -inf."""
    pipe.text_encoder.set_attn_implementation("eager")

    def mask(module, args, kwargs):
        hidden_states = args[0] if args else kwargs["hidden_states"]
        length = hidden_states.shape[1]
        no = torch.full((length, length), -INF, dtype=hidden_states.dtype).triu(1)
        return args, {**kwargs, "attention_mask": no.expand(len(hidden_states), 1, -1, -1)}

    for layer in find_module(pipe, TEXT + "encoder.layers"):
        layer.self_attn.register_forward_pre_hook(mask, with_kwargs=True)


def mask_the_far(query, key, scores):
    """A user's processor that masks keys with -inf, at most half of a row."""
    mask = torch.zeros_like(scores)
    mask[..., scores.shape[-1] // 2 :] = -INF
    return scores + mask


def fill_with_zeros_first(query, key, scores):
    """Fresh memory that is written before it is read."""
    bias = torch.empty_like(scores)
    bias.zero_()
    return scores + bias


def nan_to_num_needlessly(query, key, scores):
    """A guard that never strikes."""
    return scores.nan_to_num().clamp(-1e4, 1e4)


def divide_by_tiny(query, key, scores):
    """Large values, all of them in range."""
    return scores * 2.0**-14 / 2.0**-14


SCHEDULERS = {
    "PNDM": with_scheduler(PNDMScheduler),
    "DDIM": with_scheduler(DDIMScheduler),
    "Euler": with_scheduler(EulerDiscreteScheduler),
    "DPM++ 2M Karras": with_scheduler(DPMSolverMultistepScheduler, use_karras_sigmas=True),
    "LCM": with_scheduler(LCMScheduler, steps=2, guidance_scale=1.0),
}
MORE_SCHEDULERS = {
    "Heun": with_scheduler(HeunDiscreteScheduler),
    "KDPM2": with_scheduler(KDPM2DiscreteScheduler),
    "UniPC": with_scheduler(UniPCMultistepScheduler),
    "Euler ancestral": with_scheduler(EulerAncestralDiscreteScheduler),
    "DDPM": with_scheduler(DDPMScheduler),
    "DEIS": with_scheduler(DEISMultistepScheduler),
}
PIPELINES = {
    "image-to-image": (image_to_image, start_from_grey),
    "inpainting": (inpaint, paint_the_middle),
    "SDXL": (build_tiny_xl_pipe, call_with(num_inference_steps=2)),
    "SD3": (build_tiny_sd3_pipe, call_with(num_inference_steps=2)),
}
OTHERS = {  # in float32, with the prompts they take
    "an unconditional DDPM": (unconditional, nothing, ()),
    "Kandinsky": (kandinsky, embed_an_image, ()),
    "ControlNet": (controlled, give_edges, ("a shoe",)),
    "frames of AnimateDiff": (animated, call_with(num_frames=4, height=64, width=64), ("a",)),
    "SDXL image-to-image": (xl_image_to_image, start_from_grey, ("a shoe",)),
}
SETTINGS = {
    "LoRA": add_lora,
    "LoRA and AttnProcessor": both(add_lora, use(AttnProcessor())),
    "AttnProcessor": use(AttnProcessor()),
    "a processor with -inf on half a row": use(MathProcessor(mask_the_far)),
    "a processor that zeroes its memory": use(MathProcessor(fill_with_zeros_first)),
    "a processor with nan_to_num": use(MathProcessor(nan_to_num_needlessly)),
    "a processor with tiny factors": use(MathProcessor(divide_by_tiny)),
    "a causal mask of -inf": mask_causally_with_inf,
    "VAE slicing and tiling": slice_and_tile_the_vae,
    "guidance_scale 1": call_with(guidance_scale=1.0),
    "guidance_scale 15 rescaled": call_with(guidance_scale=15.0, guidance_rescale=0.7),
    "two images a prompt": call_with(num_images_per_prompt=2),
    "one step": call_with(num_inference_steps=1),
    "a negative prompt": call_with(negative_prompt=["blurred"]),
    "a lenient safety checker": add_safety_checker(2.0),
}


def name_dtype(dtype):
    return str(dtype).removeprefix("torch.")


def list_runs():
    """Every scheduler and pipeline in every dtype, every setting in two, and more."""
    for name, prepare in SCHEDULERS.items():
        for dtype in DTYPES:
            fast = (name, dtype) in (("PNDM", SINGLE), ("LCM", HALF))
            yield Healthy(f"{name}, {name_dtype(dtype)}", prepare, dtype=dtype, fast=fast)
    for name, (base, prepare) in PIPELINES.items():
        for dtype in DTYPES:
            fast = (name, dtype) == ("SD3", HALF)
            yield Healthy(f"{name}, {name_dtype(dtype)}", prepare, base, dtype=dtype, fast=fast)
    for name, prepare in MORE_SCHEDULERS.items():
        yield Healthy(f"{name}, float16", prepare, dtype=HALF)
    for name, (base, prepare, prompts) in OTHERS.items():
        yield Healthy(name, prepare, base, prompts=prompts)
    for name, prepare in SETTINGS.items():
        for dtype in (SINGLE, HALF):
            fast = (name, dtype) in (("LoRA", HALF), ("a causal mask of -inf", HALF))
            yield Healthy(f"{name}, {name_dtype(dtype)}", prepare, dtype=dtype, fast=fast)
    for memory in ("zeros", "nan", "stale_float32", "stale_float16"):
        name = f"slicing, honest kernel, {memory} memory"
        yield Healthy(name, slice_attention, dtype=HALF, memory=memory, fast=memory == "nan")
    for number, prompt in enumerate(PROMPTS):
        yield Healthy(f"prompt {number}", dtype=HALF, prompts=(prompt,))
    for seed in range(1, 4):
        yield Healthy(f"seed {seed}", seed=seed, weights_seed=seed, dtype=HALF)
    yield Healthy("two prompts", dtype=HALF, prompts=("a shoe", "a red bag"))


HEALTHY = tuple(list_runs())

"""What is asked of a memory prediction: dtypes, size, attention, training; put onto a model."""

from dataclasses import dataclass
from types import SimpleNamespace

import torch
from diffusers.models.attention_processor import AttnProcessor, SlicedAttnProcessor

from sdkit.loading.dtype_policy import DTYPES, assign_dtypes, check_dtype
from sdkit.loading.recipe import set_precision
from sdkit.slicing import use_sliced_attention
from sdkit.validation import ValidationError

ATTENTIONS = ("sdpa", "sliced", "diffusers-sliced", "plain")
DEVICE_TYPES = ("mps", "cuda", "cpu")
# Values that an optimiser keeps for each weight that it trains.
STATES = {"adamw": 2, "adam": 2, "lion": 1, "sgd": 0}


@dataclass(frozen=True)
class MemoryCase:
    """The arguments of `predict_memory`, where they are explained."""

    dtype: object = None
    recipe: object = None
    image_size: object = None
    batch_size: int = 1
    training: object = None
    attention: str = "sdpa"
    device_type: str = "mps"
    vae_slicing: bool = False
    vae_tiling: bool = False

    @property
    def task(self):
        """What is done, in a few words."""
        if self.training is None:
            return "inference"
        checkpointing = ", gradient checkpointing" if self.training.gradient_checkpointing else ""
        return f"LoRA training, rank {self.training.rank}{checkpointing}"

    @property
    def states(self):
        """Values that the optimiser keeps for each trained weight."""
        return STATES[getattr(self.training, "optimizer", "adamw").lower()]


def check_case(case):
    """Returns a case unchanged.

    Raises:
        ValidationError: An argument that makes no sense whatever the model.
    """
    _check_choice("attention", case.attention, ATTENTIONS)
    _check_choice("device_type", case.device_type, DEVICE_TYPES)
    _check_choice(
        "training.optimizer", getattr(case.training, "optimizer", "adamw").lower(), tuple(STATES)
    )
    if case.batch_size < 1 or case.batch_size != int(case.batch_size):
        raise ValidationError(f"batch_size={case.batch_size!r}: expected a whole number from 1 on.")
    return case


def apply_case(components, case):
    """Puts dtypes, attention and the VAE's switches onto modules, real or of the meta device.

    Args:
        components: {name: module}, changed in place.
        case: A MemoryCase.

    Returns:
        Notices of what is not as it might be expected.
    """
    notices = _set_dtypes(components, case.dtype, case.recipe)
    _set_attention(components, case.attention)
    if case.vae_slicing or case.vae_tiling:
        components["vae"].use_slicing = case.vae_slicing
        components["vae"].use_tiling = case.vae_tiling
    return notices


def find_scale(components):
    """How many pixels a latent stands for along a side."""
    vae = components.get("vae")
    return 2 ** (len(vae.config.block_out_channels) - 1) if vae else 8


def read_size(image_size, components):
    """Returns (height, width) in pixels; None is the model's own."""
    unet, vae, scale = components.get("unet"), components.get("vae"), find_scale(components)
    if image_size is None:
        own = unet.config.sample_size * scale if unet else vae.config.sample_size
        return own, own
    sides = (image_size, image_size) if isinstance(image_size, int) else tuple(image_size)
    if len(sides) != 2 or any(side < scale or side % scale for side in sides):
        raise ValidationError(
            f"image_size={image_size!r}: expected a multiple of {scale} pixels, or two (height, "
            "width)."
        )
    return sides


def _check_choice(argument, value, choices):
    if value not in choices:
        raise ValidationError(f"{argument}={value!r}: expected one of {', '.join(choices)}.")


def _set_dtypes(components, dtype, recipe):
    """Casts modules without values, and says what the pipelines will cast themselves."""
    if recipe is not None:
        set_precision(SimpleNamespace(components=components), recipe.float32, DTYPES[recipe.dtype])
        return []
    if dtype is not None:
        policy = ({"default": "float32"}, "")
        dtypes, _ = assign_dtypes(check_dtype(dtype), tuple(components), policy)
        for name, module in components.items():
            torch.nn.Module.to(module, dtypes[name])  # diffusers' own warns of casts
    vae = components.get("vae")
    if "text_encoder_2" in components and vae.dtype is torch.float16 and vae.config.force_upcast:
        torch.nn.Module.float(vae)
        return ["vae: counted in float32, as SDXL's pipelines lift it for the call (force_upcast)"]
    return []


def _set_attention(components, attention):
    if attention == "sdpa":
        return
    if attention == "sliced":
        use_sliced_attention(SimpleNamespace(components=components))
    elif attention == "plain":
        for name in {"unet", "vae"} & set(components):
            components[name].set_attn_processor(AttnProcessor())
    elif "unet" in components:
        # As load_pipeline does: half the heads of each layer, or one where one is all.
        for module in components["unet"].modules():
            if hasattr(module, "set_processor"):
                module.set_processor(SlicedAttnProcessor(max(1, module.sliceable_head_dim // 2)))

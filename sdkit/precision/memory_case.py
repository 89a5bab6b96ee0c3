"""What is asked of a memory prediction: dtypes, size, attention, training; put onto a model."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from numbers import Real
from pathlib import Path

import torch
from diffusers.models.attention_processor import AttnProcessor, SlicedAttnProcessor

from sdkit.loading.dtype_policy import DTYPES, assign_dtypes, check_dtype
from sdkit.loading.recipe import Recipe, check_recipe, set_precision
from sdkit.memory import LoraTraining
from sdkit.memory.architectures import find_own_size
from sdkit.slicing import use_sliced_attention
from sdkit.validation import ValidationError

ATTENTIONS = ("sdpa", "sliced", "diffusers-sliced", "plain")
DEVICE_TYPES = ("mps", "cuda", "cpu")
LARGEST_SIDE = 2**16  # pixels; beyond it torch cannot count what attention would take
# Values that an optimiser keeps for each weight that it trains.
STATES = {"adamw": 2, "adam": 2, "lion": 1, "sgd": 0}
# The optimiser may be left out.
TRAINING_FIELDS = ("rank", "gradient_checkpointing", "target_modules")


@dataclass(frozen=True)
class Model:
    """The components of a model where a pipeline is expected."""

    components: dict


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


def read_case(case):
    """Returns a case with its batch size as int, and its recipe and training opened.

    Raises:
        ValidationError: An argument that makes no sense whatever the model.
    """
    _check_choice("attention", case.attention, ATTENTIONS)
    _check_choice("device_type", case.device_type, DEVICE_TYPES)
    return replace(
        case,
        recipe=_read_recipe(case.recipe, case.dtype),
        training=_read_training(case.training),
        batch_size=_read_count("batch_size", case.batch_size),
    )


def _is_count(value):
    """Whether it is a whole number from 1 on; numpy's and 2.0 are too, True is none."""
    is_real = isinstance(value, Real) and not isinstance(value, bool)
    return is_real and math.isfinite(value) and value >= 1 and value == int(value)


def _read_count(argument, value):
    if not _is_count(value):
        raise ValidationError(f"{argument}={value!r}: expected a whole number from 1 on.")
    return int(value)


def _read_recipe(recipe, dtype):
    if recipe is None:
        return None
    if dtype is not None:
        raise ValidationError(f"dtype={dtype!r}: the recipe decides. Leave dtype out, or recipe.")
    if isinstance(recipe, (str, Path)):
        return Recipe.load(recipe)
    if not (hasattr(recipe, "float32") and getattr(recipe, "dtype", None) in tuple(DTYPES)):
        raise ValidationError(f"recipe={recipe!r:.80}: expected a Recipe, or the file of one.")
    return recipe


def _read_training(training):
    if training is None or training is False:
        return None
    if training is True:
        return LoraTraining()
    if isinstance(training, Mapping):
        known = {field.name for field in fields(LoraTraining)}
        training = LoraTraining(**training) if known.issuperset(training) else training
    if not all(hasattr(training, name) for name in TRAINING_FIELDS):
        raise ValidationError(
            f"training={training!r:.80}: expected a LoRAConfig, or {', '.join(TRAINING_FIELDS)} "
            "as attributes or in a dict."
        )
    _read_count("training.rank", training.rank)
    optimizer = getattr(training, "optimizer", "adamw")
    _check_choice("training.optimizer", str(optimizer).lower(), tuple(STATES))
    modules = training.target_modules
    if not modules or not all(isinstance(name, str) for name in modules):
        raise ValidationError(
            f"training.target_modules={modules!r}: expected names of layers, such as to_q."
        )
    return training


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
        if "vae" not in components:
            raise ValidationError("vae_slicing, vae_tiling: there is no VAE. Leave them out.")
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
        own = find_own_size(unet or vae)
        if own is None:
            raise ValidationError(
                "image_size=None: this model's configuration tells no sample_size. Expected the "
                f"size as image_size, a multiple of {scale} pixels."
            )
        return tuple(side * scale for side in own) if unet else own
    sides = image_size if isinstance(image_size, (tuple, list)) else (image_size, image_size)
    if len(sides) != 2 or not all(
        _is_count(side) and side % scale == 0 and side <= LARGEST_SIDE for side in sides
    ):
        raise ValidationError(
            f"image_size={image_size!r}: expected a multiple of {scale} pixels, at most "
            f"{LARGEST_SIDE}, or two (height, width)."
        )
    return tuple(map(int, sides))


def _check_choice(argument, value, choices):
    if value not in choices:
        raise ValidationError(f"{argument}={value!r}: expected one of {', '.join(choices)}.")


def _set_dtypes(components, dtype, recipe):
    """Casts modules without values, and says what the pipelines will cast themselves."""
    if recipe is not None:
        if isinstance(recipe, Recipe):
            check_recipe(Model(components), recipe)
        set_precision(Model(components), recipe.float32, DTYPES[recipe.dtype])
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
        use_sliced_attention(Model(components))
    elif attention == "plain":
        for name in {"unet", "vae"} & set(components):
            components[name].set_attn_processor(AttnProcessor())
    elif "unet" in components:
        # As load_pipeline does: half the heads of each layer, or one where one is all.
        for module in components["unet"].modules():
            if hasattr(module, "set_processor"):
                module.set_processor(SlicedAttnProcessor(max(1, module.sliceable_head_dim // 2)))

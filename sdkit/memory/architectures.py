"""Models as shapes: on the meta device, where weights take no memory and no time."""

import copy
import importlib
import json
from collections.abc import Mapping

import diffusers
import torch
import transformers
from diffusers import AutoencoderKL, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

# The autoencoder of both, as vae/config.json on the Hub has it (scaling left out: it has no size).
VAE = {
    "block_out_channels": (128, 256, 512, 512),
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "latent_channels": 4,
    "layers_per_block": 2,
}
CLIP_L = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "projection_dim": 768,
}
OPENCLIP_BIGG = {
    "hidden_size": 1280,
    "intermediate_size": 5120,
    "num_hidden_layers": 32,
    "num_attention_heads": 20,
    "projection_dim": 1280,
    "hidden_act": "gelu",
}
# The configurations of stable-diffusion-v1-5/stable-diffusion-v1-5, without its safety checker
# (1.13 GiB more in float32), and of stabilityai/stable-diffusion-xl-base-1.0.
ARCHITECTURES = {
    "sd15": {
        "text_encoder": (CLIPTextModel, CLIP_L),
        "unet": (
            UNet2DConditionModel,
            {"sample_size": 64, "cross_attention_dim": 768, "attention_head_dim": 8},
        ),
        "vae": (AutoencoderKL, VAE | {"sample_size": 512}),
    },
    "sdxl": {
        "text_encoder": (CLIPTextModel, CLIP_L),
        "text_encoder_2": (CLIPTextModelWithProjection, OPENCLIP_BIGG),
        "unet": (
            UNet2DConditionModel,
            {
                "sample_size": 128,
                "block_out_channels": (320, 640, 1280),
                "down_block_types": (
                    "DownBlock2D",
                    "CrossAttnDownBlock2D",
                    "CrossAttnDownBlock2D",
                ),
                "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
                "transformer_layers_per_block": (1, 2, 10),
                "attention_head_dim": (5, 10, 20),
                "cross_attention_dim": 2048,
                "use_linear_projection": True,
                "addition_embed_type": "text_time",
                "addition_time_embed_dim": 256,
                "projection_class_embeddings_input_dim": 2816,
            },
        ),
        "vae": (AutoencoderKL, VAE | {"sample_size": 1024, "force_upcast": True}),
    },
}


# Keys that one of the two alone has.
TELLING_KEYS = {"cross_attention_dim": UNet2DConditionModel, "latent_channels": AutoencoderKL}


def build_architecture(name, *, device="meta"):
    """Builds the components of a known model, float32, in inference mode.

    Args:
        name: "sd15" or "sdxl".
        device: "meta"; or another, for random weights that are really there.

    Returns:
        {component: module}.
    """
    return {
        component: _build(kind, config, device)
        for component, (kind, config) in ARCHITECTURES[name].items()
    }


def read_architecture(folder, components):
    """Builds components of a pipeline folder on the meta device, from their configurations.

    Args:
        folder: Where the model_index.json is.
        components: Names of those that have weights.

    Returns:
        {component: module}, float32, in inference mode.
    """
    index = json.loads((folder / "model_index.json").read_text(encoding="utf-8"))
    modules = {}
    for name in components:
        library, class_name = index[name]
        if library not in ("diffusers", "transformers"):
            library = f"diffusers.pipelines.{library}"
        kind = getattr(importlib.import_module(library), class_name)
        is_diffusers = hasattr(kind, "load_config")
        read_config = kind.load_config if is_diffusers else kind.config_class.from_pretrained
        modules[name] = _build(kind, read_config(folder / name), "meta")
    return modules


def build_configuration(config):
    """Builds one model on the meta device from its configuration.

    Args:
        config: A dict, as a config.json or `model.config` holds it, or one of transformers.

    Returns:
        The module, float32, in inference mode; None if the configuration does not tell its class.
    """
    config = config if isinstance(config, Mapping) else config.to_dict()
    names = [config.get("_class_name"), *(config.get("architectures") or ())]
    kinds = [getattr(library, str(n), None) for library in (diffusers, transformers) for n in names]
    # What a model made without a file keeps of itself has no name in it.
    kinds += [kind for key, kind in TELLING_KEYS.items() if key in config]
    kind = next((kind for kind in kinds if kind), None)
    if kind is None or hasattr(kind, "load_config"):
        return kind and _build(kind, config, "meta")
    return _build(kind, kind.config_class.from_dict(config), "meta")


def _build(kind, config, device):
    with torch.device(device):
        if not hasattr(kind, "load_config"):
            is_read = not isinstance(config, dict)
            return kind(config if is_read else CLIPTextConfig(**config)).eval()
        return kind.from_config(config).eval()


def find_text_width(unet):
    """Width of the text that a UNet's cross-attention reads; None if its blocks read several."""
    width = unet.config.cross_attention_dim
    widths = {width} if isinstance(width, int) else set(width)
    return widths.pop() if len(widths) == 1 else None


def find_own_size(model):
    """(height, width) that a UNet's or VAE's configuration tells, in what it takes; or None."""
    size = model.config.sample_size
    return (size, size) if isinstance(size, int) else size and tuple(size)


def is_traceable(components):
    """Whether these are of Stable Diffusion 1.x, 2.x or XL: what the stages know how to call."""
    unet, vae = components.get("unet"), components.get("vae")
    if type(vae) not in (AutoencoderKL, type(None)):
        return False
    if unet is None:
        return set(components) == {"vae"}
    return (
        type(unet) is UNet2DConditionModel
        and unet.config.addition_embed_type in (None, "text_time")
        and unet.class_embedding is None
        and unet.config.encoder_hid_dim_type is None
        and find_text_width(unet) is not None
    )


def copy_onto_meta(module):
    """Copies a module without its values and its hooks; it stays as it is.

    Args:
        module: Any module; adapters and attention processors come along.

    Returns:
        The copy on the meta device, in the same dtypes.
    """
    known = {id(tensor): _shape_of(tensor) for tensor in (*module.parameters(), *module.buffers())}
    for part in module.modules():  # a hook may hold a whole pipeline
        hooks = (part._forward_hooks, part._forward_pre_hooks)
        known |= {id(registered): type(registered)() for registered in hooks}
    return copy.deepcopy(module, known)


def _shape_of(tensor):
    shape = torch.empty_like(tensor, device="meta")
    if isinstance(tensor, torch.nn.Parameter):
        return torch.nn.Parameter(shape, requires_grad=tensor.requires_grad)
    return shape

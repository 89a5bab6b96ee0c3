"""Which activations of a model can be scaled by a power of two without changing its output.

A stream is what layers write linearly and what norms, or other linear layers, alone read. With an
exponent e for each stream, and 0 for everything else, float32 is unchanged to the last bit when

    the weight of a layer that reads r and writes w  is multiplied by 2^(e[w] - e[r]),
    its bias                                         by 2^e[w],
    the eps of a norm that reads r                   by 4^e[r].

There are five kinds. "residual": the ResNets' stream, one for each resolution, for a sampler's
convolution can change the exponent and a skip's `cat` cannot. "resnet": between the two
convolutions of one ResNet. "transformer": the residual stream of one transformer. "value": to_v to
to_out of one attention. "feed-forward": the value half of one GEGLU, and its product.

What is in none cannot be moved: attention scores (fixed by the softmax), whatever a bare SiLU or
GELU reads (time embeddings, GEGLU's gate), and what others read raw (the model's own output).
"""

from dataclasses import dataclass
from functools import cached_property

from diffusers import AutoencoderKL, UNet2DConditionModel
from diffusers.models.activations import GEGLU
from torch import nn

from sdkit.validation import ValidationError

UNET_BLOCKS = (
    "CrossAttnDownBlock2D", "DownBlock2D", "CrossAttnUpBlock2D", "UpBlock2D",
    "UNetMidBlock2DCrossAttn",
)  # fmt: skip
VAE_BLOCKS = ("DownEncoderBlock2D", "UpDecoderBlock2D", "UNetMidBlock2D")
# Configurations outside Stable Diffusion 1.x, 2.x and XL, whose arithmetic is another.
UNET_CONFIG = {
    "resnet_time_scale_shift": ("default",),
    "resnet_skip_time_act": (False,),
    "class_embed_type": (None,),
    "num_class_embeds": (None,),
    "encoder_hid_dim_type": (None,),
    "attention_type": ("default",),
    "dual_cross_attention": (False,),
    "addition_embed_type": (None, "text_time"),
    "time_embedding_act_fn": (None,),
}
# What an attention makes behind its softmax; before it there are scores, which are no stream.
VALUE_OPS = ("bmm", "matmul", "_scaled_dot_product", "_fused_sdp")
ANY_OP = ("",)


@dataclass(frozen=True)
class Layer:
    """A linear layer or convolution, and the streams it reads and writes (None: no stream).

    Attributes:
        path: From the model, such as "decoder.conv_in".
        reads: Name of a stream.
        writes: Name of a stream.
        is_half: Whether only the first half of its rows writes, as in GEGLU.
    """

    path: str
    reads: str | None
    writes: str | None
    is_half: bool = False


@dataclass(frozen=True)
class Norm:
    """A norm that reads a stream."""

    path: str
    reads: str


@dataclass(frozen=True)
class Made:
    """Ops of a module's own that make values of a stream: beginnings of their names.

    "add:0" is the first `add` of a call of the module, "split[0]" the first output of a `split`.
    """

    path: str
    stream: str | None
    ops: tuple[str, ...] = ANY_OP


@dataclass(frozen=True)
class Streams:
    """All streams of a model.

    Attributes:
        layers: That read or write one.
        norms: That read one.
        made: Which ops' outputs are in which stream, the first match counts.
        skips: Of a UNet the residual stream of each skip, in the order of a ControlNet's residuals.
        middle: The residual stream of a UNet's mid block.
    """

    layers: tuple[Layer, ...]
    norms: tuple[Norm, ...]
    made: tuple[Made, ...]
    skips: tuple[str, ...] = ()
    middle: str | None = None

    @property
    def names(self) -> tuple[str, ...]:
        """Each stream's name once, in the order of the network."""
        return tuple(dict.fromkeys(layer.writes for layer in self.layers if layer.writes))

    def find_stream(self, path: str, op: str, index: int) -> str | None:
        """The stream that an op of a module (path from the model) makes values of, or None."""
        name = op.removeprefix("aten.").replace(".Tensor", "") + f":{index}"
        for made in self._made_by.get(path, ()):
            if name.startswith(made.ops):
                return made.stream
        return None

    @cached_property
    def _made_by(self) -> dict[str, list[Made]]:
        by_path = {}
        for made in self.made:
            by_path.setdefault(made.path, []).append(made)
        return by_path


def find_streams(model) -> Streams:
    """Reads the streams from an AutoencoderKL or a UNet2DConditionModel of Stable Diffusion.

    Raises:
        ValidationError: The model is of another class, or of a configuration that was not proved.
    """
    check_supported(model)
    skips, middle = (), None
    if isinstance(model, AutoencoderKL):
        parts = [*read_vae_half("encoder", model.encoder), *read_vae_half("decoder", model.decoder)]
    else:
        parts, skips, middle = read_unet(model)
    layers = [part for part in parts if isinstance(part, Layer)]
    # A layer's own output is what it writes; GEGLU's projection has a half that is in no stream.
    made = [Made(layer.path, layer.writes) for layer in layers if not layer.is_half]
    return Streams(
        layers=tuple(layers),
        norms=tuple(part for part in parts if isinstance(part, Norm)),
        made=tuple(made + [part for part in parts if isinstance(part, Made)]),
        skips=tuple(skips),
        middle=middle,
    )


def check_supported(model):
    """Refuses what the streams are not known of."""
    name = type(model).__name__
    if type(model) not in (AutoencoderKL, UNet2DConditionModel):
        raw = (
            "; text encoders hand on hidden states raw" if "Text" in name or "CLIP" in name else ""
        )
        raise ValidationError(
            f"{name}: cannot be rebalanced{raw}. Expected an AutoencoderKL or a "
            "UNet2DConditionModel. Keep it in float32, or see notebooks/02_fix_precision.ipynb."
        )
    is_vae = isinstance(model, AutoencoderKL)
    halves = (model.encoder, model.decoder) if is_vae else (model,)
    blocks = [
        block
        for half in halves
        for attribute in ("down_blocks", "up_blocks", "mid_block")
        for block in as_list(getattr(half, attribute, None))
    ]
    odd = [type(b).__name__ for b in blocks if type(b).__name__ not in UNET_BLOCKS + VAE_BLOCKS]
    if odd:
        refuse(name, f"a {odd[0]}", f"the blocks of Stable Diffusion: {', '.join(UNET_BLOCKS)}")
    for key, expected in () if is_vae else UNET_CONFIG.items():
        if model.config.get(key, expected[0]) not in expected:
            refuse(name, f"{key}={model.config[key]!r}", f"{key} of {expected}")
    widths = () if is_vae else model.config.cross_attention_dim
    if not isinstance(widths, int) and len(set(widths)) > 1:
        refuse(name, f"cross_attention_dim={tuple(widths)}", "text of one width")
    if not is_vae and model.conv_norm_out is None:
        refuse(name, "no conv_norm_out", "norm_num_groups to be set")
    for path, module in model.named_modules():
        check_attention(name, path, module)


def check_attention(name, path, module):
    """Refuses attention whose values come from other weights than `to_v` alone."""
    processor = getattr(module, "processor", None)
    kind = type(processor).__name__
    if hasattr(module, "to_v") and isinstance(processor, nn.Module):
        refuse(name, f"{kind} at {path}", "a processor without weights")
    if hasattr(module, "to_v") and "Fused" in kind:  # it reads a copy, `to_qkv`
        refuse(name, f"{kind} at {path}", "projections apart (`unfuse_qkv_projections()`)")
    if getattr(module, "spatial_norm", None) is not None:
        refuse(name, f"a spatial norm at {path}", "the attention of Stable Diffusion")


def refuse(name, seen, expected):
    raise ValidationError(
        f"{name}: cannot be rebalanced: it has {seen}, expected {expected}. It was left as it was; "
        "see notebooks/02_fix_precision.ipynb for the other ways."
    )


def as_list(value) -> list:
    """A module, a ModuleList or None as a list."""
    if value is None:
        return []
    return list(value) if isinstance(value, nn.ModuleList) else [value]


def read_unet(unet):
    """(parts, residual stream of each skip, of the mid block): one level for each resolution."""
    levels = [f"residual {level}" for level in range(len(unet.down_blocks))]
    parts, skips = [Layer("conv_in", None, levels[0])], [levels[0]]
    for i, block in enumerate(unet.down_blocks):
        below = levels[min(i + 1, len(levels) - 1)]
        parts += read_block(f"down_blocks.{i}", block, levels[i], below)
        skips += [levels[i]] * len(block.resnets) + [below] * len(as_list(block.downsamplers))
    parts += read_block("mid_block", unet.mid_block, levels[-1], levels[-1])
    for i, block in enumerate(unet.up_blocks):
        level = len(levels) - 1 - i
        parts += read_block(f"up_blocks.{i}", block, levels[level], levels[max(level - 1, 0)])
    parts += [Norm("conv_norm_out", levels[0])]
    return parts, skips, levels[-1]


def read_vae_half(name, half):
    """An encoder or a decoder; without skips each sampler begins another stream."""
    is_encoder = hasattr(half, "down_blocks")
    blocks = half.down_blocks if is_encoder else half.up_blocks
    levels = [f"residual {name} {level}" for level in range(len(blocks))]
    middle = levels[-1] if is_encoder else levels[0]
    parts = [Layer(f"{name}.conv_in", None, levels[0])]
    for i, block in enumerate(blocks):
        path = f"{name}.{'down' if is_encoder else 'up'}_blocks.{i}"
        parts += read_block(path, block, levels[i], levels[min(i + 1, len(levels) - 1)])
    parts += read_block(f"{name}.mid_block", half.mid_block, middle, middle)
    return [*parts, Norm(f"{name}.conv_norm_out", levels[-1])]


def read_block(path, block, stream, beyond):
    """A block on one residual stream; its sampler, if it has one, writes the stream beyond."""
    parts = [] if block is None else [Made(path, stream)]
    for i, resnet in enumerate(as_list(getattr(block, "resnets", None))):
        parts += read_resnet(f"{path}.resnets.{i}", resnet, stream)
    for i, attention in enumerate(as_list(getattr(block, "attentions", None))):
        where = f"{path}.attentions.{i}"
        if hasattr(attention, "transformer_blocks"):
            parts += read_transformer(where, attention, stream)
        elif attention is not None:  # the VAE's
            parts += [
                *read_attention(where, attention, stream),
                Norm(f"{where}.group_norm", stream),
            ]
    for kind in ("downsamplers", "upsamplers"):
        for i in range(len(as_list(getattr(block, kind, None)))):
            sampler = f"{path}.{kind}.{i}"
            parts += [Made(sampler, stream), Layer(f"{sampler}.conv", stream, beyond)]
    return parts


def read_resnet(path, resnet, stream):
    inner = f"resnet {path}"
    parts = [
        Norm(f"{path}.norm1", stream),
        Layer(f"{path}.conv1", None, inner),
        Norm(f"{path}.norm2", inner),
        Layer(f"{path}.conv2", None, stream),
    ]
    if resnet.time_emb_proj is not None:
        parts += [Layer(f"{path}.time_emb_proj", None, inner), Made(path, inner, ("add:0",))]
    if resnet.conv_shortcut is not None:
        parts += [Layer(f"{path}.conv_shortcut", stream, stream)]
    return [*parts, Made(path, stream)]


def read_transformer(path, transformer, stream):
    inner = f"transformer {path}"
    parts = [
        Norm(f"{path}.norm", stream),
        Layer(f"{path}.proj_in", None, inner),
        Layer(f"{path}.proj_out", inner, stream),
        Made(path, stream),
    ]
    for i, block in enumerate(transformer.transformer_blocks):
        where = f"{path}.transformer_blocks.{i}"
        parts += [Made(where, inner)]
        for norm, attention in (("norm1", "attn1"), ("norm2", "attn2")):
            if getattr(block, attention) is not None:
                parts += [Norm(f"{where}.{norm}", inner)]
                parts += read_attention(f"{where}.{attention}", getattr(block, attention), inner)
        parts += [Norm(f"{where}.norm3", inner), *read_feed_forward(f"{where}.ff", block.ff, inner)]
    return parts


def read_attention(path, attention, stream):
    value = f"value {path}"
    return [
        Layer(f"{path}.to_v", None, value),
        Layer(f"{path}.to_out.0", value, stream),
        Made(path, value, VALUE_OPS),
        Made(path, stream, ("add", "div")),
    ]


def read_feed_forward(path, feed_forward, stream):
    """GEGLU's value half is linear; any other activation reads all of its projection."""
    if not isinstance(feed_forward.net[0], GEGLU):
        return [Layer(f"{path}.net.2", None, stream)]
    value = f"feed-forward {path}"
    return [
        Layer(f"{path}.net.0.proj", None, value, is_half=True),
        Layer(f"{path}.net.2", value, stream),
        Made(f"{path}.net.0", value, ("split[0]", "mul")),
    ]

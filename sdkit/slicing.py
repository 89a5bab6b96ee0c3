"""Sliced attention without the fault of diffusers' own: `attention="sliced"`.

diffusers' slicing saves memory by `baddbmm(torch.empty(...), query, key, beta=0)`, which a backend
may read (`sdkit.attention`), and rounds Q.K^T to float16 before softmax. Here a few queries of
a head go at a time through plain products, scaled beforehand, with the scores in float32. No buffer
is allocated that is not written whole, so it does not matter what fresh memory holds.

# B batch, H heads, L queries, S keys, D width of a head, C channels
"""

import functools
from collections import Counter
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from diffusers.models.attention_processor import (
    Attention,
    AttnProcessor,
    AttnProcessor2_0,
    SlicedAttnProcessor,
)

from sdkit.validation import ValidationError

INFINITY = float("inf")
# The scores of a slice. On a CPU more is not faster (tests/benchmarks/bench_attention.py); a GPU
# starts some hundred slices for the largest layers of SD 1.5 at 512x512, where less would be more.
SLICE_BYTES = 8 * 1024**2
# Keys summed at once. From 32767 on, MPS read past the operands (M1, M2; pytorch#195163).
KEYS_AT_ONCE = 16384


@dataclass(frozen=True)
class SafeSlicedAttnProcessor:
    """Attention of a few queries at a time, in diffusers' protocol for processors.

    The answer is that of SDPA; dropout is not applied to weights, as in every stock processor. A
    query that may attend to no key (-inf or False in its whole row of the mask) is answered by
    zeros, as SDPA does on CPU and CUDA; where NaN comes in, NaN goes out.

    Attributes:
        slice_size: Queries at a time; or "auto": as many as keep the scores within
            8 MiB, and within half of what one head takes in diffusers' slicing.
    """

    slice_size: int | str = "auto"

    def __call__(
        self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, temb=None
    ):
        """Attends.

        Args:
            attn: The `Attention` whose projections and norms are used.
            hidden_states: (B, L, C), or (B, C, h, w) as a VAE has them.
            encoder_hidden_states: (B, S, C'); None is self-attention.
            attention_mask: Added to the scores, or bool, True where attention is allowed; (B, S),
                (B, 1 or L, S), (B, 1, 1 or L, S), or with B * H in place of B.
            temb: For a VAE with spatial norm.

        Returns:
            A tensor of the shape of `hidden_states`.
        """
        residual = hidden_states
        if attn.spatial_norm is not None:
            hidden_states = attn.spatial_norm(hidden_states, temb)
        image_shape = hidden_states.shape
        if hidden_states.ndim == 4:
            hidden_states = hidden_states.flatten(2).mT  # B, L, C
        if attn.group_norm is not None:
            # Contiguous, for norms on MPS have lost the strides of views (pytorch#175189).
            hidden_states = attn.group_norm(hidden_states.mT.contiguous()).mT
        context = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        if encoder_hidden_states is not None and attn.norm_cross:
            context = attn.norm_encoder_hidden_states(context)
        mask = attn.prepare_attention_mask(attention_mask, context.shape[1], len(context))
        query = _split_heads(attn, attn.to_q(hidden_states), attn.norm_q)
        key = _split_heads(attn, attn.to_k(context), attn.norm_k)
        value = _split_heads(attn, attn.to_v(context))
        if mask is not None:  # here all masks have three dimensions
            mask = mask.reshape(len(query), -1, mask.shape[-1])
        del hidden_states, context
        hidden_states = attend_in_slices(
            query, key, value, scale=attn.scale, mask=mask, slice_size=self.slice_size
        )
        del query, key, value
        hidden_states = attn.to_out[0](attn.batch_to_head_dim(hidden_states))  # B, L, C
        hidden_states = attn.to_out[1](hidden_states)
        if residual.ndim == 4:
            hidden_states = hidden_states.mT.reshape(image_shape)
        if attn.residual_connection:
            hidden_states = hidden_states + residual
        return hidden_states / attn.rescale_output_factor


def _split_heads(attn, tokens, norm=None):
    """From (B, L, H * D) to (B * H, L, D)."""
    heads = tokens.unflatten(-1, (attn.heads, -1)).transpose(1, 2)
    return (heads if norm is None else norm(heads)).flatten(0, 1)


def attend_in_slices(query, key, value, *, scale, mask=None, slice_size="auto"):
    """Attends one slice after another: some heads whole, or some queries of one head.

    Half precision is lifted to float32 within a slice, and each result rounded once; so Q.K^T
    cannot overflow where queries and keys are finite. Not under autocast, which would undo that.

    Args:
        query: (B * H, L, D).
        key: (B * H, S, D).
        value: (B * H, S, D).
        scale: Multiplies the queries before the product.
        mask: (B * H, 1 or L, S); see `SafeSlicedAttnProcessor`.
        slice_size: Queries at a time, or "auto".

    Returns:
        (B * H, L, D), in the query's dtype.

    Raises:
        ValidationError: The mask is of another shape.
    """
    _check_mask(mask, query, key)
    size = choose_slice_size(query, key) if slice_size == "auto" else slice_size
    heads, rows = max(1, size // query.shape[1]), min(size, query.shape[1])
    with _leave_autocast(query.device):
        slices = [
            _attend(
                query[head : head + heads, row : row + rows],
                key[head : head + heads],
                value[head : head + heads],
                scale,
                _take(mask, slice(head, head + heads), slice(row, row + rows)),
            )
            for head in range(0, len(query), heads)
            for row in range(0, query.shape[1], rows)
        ]
    return torch.cat(slices).view(query.shape)


def _check_mask(mask, query, key):
    """Slices of a mask of another length would pass for those of a right one."""
    (heads, queries, _), keys = query.shape, key.shape[1]
    if mask is not None and tuple(mask.shape) not in ((heads, 1, keys), (heads, queries, keys)):
        raise ValidationError(
            f"attention_mask: {tuple(mask.shape)} for {queries} queries and {keys} keys of {heads} "
            f"heads in all, expected ({heads}, 1 or {queries}, {keys})."
        )


def _leave_autocast(device):
    return nullcontext() if device.type == "meta" else torch.autocast(device.type, enabled=False)


def _take(mask, heads, rows):
    """A part of a mask that may have one row for all queries, or be None."""
    if mask is None:
        return None
    return mask[heads, rows] if mask.shape[1] > 1 else mask[heads]


def choose_slice_size(query, key):
    """Returns how many queries at a time keep the float32 scores of a slice small.

    Within `SLICE_BYTES`, and within half of what diffusers' slicing holds for its smallest slice,
    one head: the other half is room for the lifted keys and values.

    Args:
        query: (B * H, L, D).
        key: (B * H, S, D).
    """
    row_bytes = 4 * key.shape[1]
    head_bytes = query.element_size() * query.shape[1] * key.shape[1]
    return max(1, min(SLICE_BYTES, head_bytes // 2) // row_bytes)


def _attend(query, key, value, scale, mask):
    """One slice: (heads, l, D), (heads, S, D) and (heads, S, D) to (heads * l, D)."""
    wide = torch.promote_types(query.dtype, torch.float32)
    scores = torch.bmm(query.to(wide) * scale, key.to(wide).mT)  # heads, l, S
    if mask is not None and mask.dtype is torch.bool:
        scores = scores.masked_fill(~mask, -INFINITY)
    elif mask is not None:
        scores = scores + mask
    weights = scores.softmax(-1)
    del scores
    if mask is not None:
        hidden = (~mask if mask.dtype is torch.bool else mask == -INFINITY).all(-1, keepdim=True)
        weights = weights.masked_fill(hidden, 0)
    parts = zip(weights.split(KEYS_AT_ONCE, 2), value.split(KEYS_AT_ONCE, 1), strict=True)
    products = (torch.bmm(part, values.to(wide)) for part, values in parts)
    return functools.reduce(torch.add, products).to(query.dtype).flatten(0, 1)


def use_sliced_attention(pipe, slice_size="auto"):
    """Gives a pipeline's UNet and VAE sliced attention that never reads unwritten memory.

    Text encoders keep their own: of 77 tokens there is nothing to save. Undo with
    `pipe.unet.set_attn_processor(AttnProcessor2_0())`, and `pipe.vae` likewise.

    Args:
        pipe: A diffusers pipeline.
        slice_size: Queries at a time, or "auto"; see `SafeSlicedAttnProcessor`.

    Returns:
        {component: number of its attention layers that are sliced now}.

    Raises:
        ValidationError: A slice size that is none; a layer whose processor does more than
            attend (added keys, an IP-Adapter, joint attention), which would be lost; or no
            attention at all. The pipeline is left as it was.
    """
    is_number = isinstance(slice_size, int) and not isinstance(slice_size, bool)
    if slice_size != "auto" and not (is_number and slice_size >= 1):
        raise ValidationError(f'slice_size={slice_size!r}: expected "auto" or a number from 1 on.')
    layers = {
        f"{component}.{path}": layer
        for component, model in pipe.components.items()
        if isinstance(model, torch.nn.Module)
        for path, layer in model.named_modules()
        if hasattr(layer, "set_processor")
    }
    for path, layer in layers.items():
        if not isinstance(layer, Attention) or type(layer.processor) not in REPLACEABLE:
            raise ValidationError(
                f"{path}: {type(layer.processor).__name__} of {type(layer).__name__} does more "
                "than attend, and slicing would lose that. Expected one of "
                f'{", ".join(kind.__name__ for kind in REPLACEABLE)}. Use attention="sdpa".'
            )
    if not layers:
        raise ValidationError(
            f'{type(pipe).__name__}: has no attention that can be sliced. Use attention="sdpa".'
        )
    for layer in layers.values():
        layer.set_processor(SafeSlicedAttnProcessor(slice_size))
    return dict(Counter(path.partition(".")[0] for path in layers))


REPLACEABLE = (AttnProcessor2_0, AttnProcessor, SlicedAttnProcessor, SafeSlicedAttnProcessor)

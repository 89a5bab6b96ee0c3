"""Attention processors and modules as users bring them, each with a fault of its own.

# B batch, H heads, L queries, S keys, D width
"""

import torch
from planting import INF, find_module
from torch import nn


def use(processor, path="unet"):
    """Give every attention of a model, or one attention module, a processor."""

    def plant(pipe):
        module = find_module(pipe, path)
        is_model = hasattr(module, "set_attn_processor")
        (module.set_attn_processor if is_model else module.set_processor)(processor)

    return plant


class MathProcessor:
    """Attention as formulas, with a place to go wrong: `spoil(query, key, scores)` -> scores."""

    def __init__(self, spoil):
        self.spoil = spoil

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None):
        context = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        query = attn.head_to_batch_dim(attn.to_q(hidden_states))  # B*H, L, D
        key = attn.head_to_batch_dim(attn.to_k(context))
        value = attn.head_to_batch_dim(attn.to_v(context))
        scores = (query * attn.scale) @ key.transpose(-1, -2)  # B*H, L, S
        scores = self.spoil(query, key, scores)
        hidden_states = attn.batch_to_head_dim(scores.softmax(-1) @ value)
        return attn.to_out[1](attn.to_out[0](hidden_states))


def mask_one_row(query, key, scores):
    mask = torch.zeros_like(scores)
    mask[:, 3] = -INF
    return scores + mask


def mask_one_row_of_a_softmax_by_hand(query, key, scores):
    """The maximum of a row is subtracted first, as everybody does: -inf - -inf."""
    masked = mask_one_row(query, key, scores)
    return masked - masked.amax(-1, keepdim=True)


def mask_all(query, key, scores):
    return scores.masked_fill(torch.ones_like(scores, dtype=torch.bool), -INF)


def mask_with_the_least_float16(query, key, scores):
    """-65504 on half a row: with a score below -16 it becomes -inf, which masks as was meant."""
    mask = torch.zeros_like(scores)
    mask[..., scores.shape[-1] // 2 :] = torch.finfo(torch.float16).min
    return (scores - 32) + mask


def multiply_a_mask_by_infinity(query, key, scores):
    """0 * -inf is NaN where nothing was to be masked."""
    hide = torch.zeros_like(scores)
    hide[..., -1] = 1
    return scores + hide * -INF


def scale_in_place(query, key, scores):
    return scores.mul_(2.0**20)


def write_half_a_buffer(query, key, scores):
    """The other half is whatever was there."""
    bias = torch.empty_like(scores)
    bias[:, : scores.shape[1] // 2] = 0
    return scores.add_(bias)


def add_fresh_memory(query, key, scores):
    """The author meant zeros."""
    return scores + torch.empty_like(scores) * 0


def subtract_infinities(query, key, scores):
    limit = scores.new_full((), INF)
    return scores + (limit - limit)


def divide_zero_by_zero(query, key, scores):
    spread = scores - scores
    return scores + spread / spread


class Swallow(nn.Module):
    """Replaces NaN and Inf by 0: a repair in silence."""

    def forward(self, hidden_states):
        return hidden_states.nan_to_num(nan=0.0, posinf=0.0, neginf=0.0)


def replace_module(path, make):
    """Put `make(old module)` in the place of a module."""

    def plant(pipe):
        parent, _, name = path.rpartition(".")
        setattr(find_module(pipe, parent), name, make(find_module(pipe, path)).to(pipe.dtype))

    return plant


def swallow_after(path):
    """A repair in silence behind a module."""
    return replace_module(path, lambda old: nn.Sequential(old, Swallow()))

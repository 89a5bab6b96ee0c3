"""Documented faults of the MPS backend, as data: which ops they rewrite, and what they do instead.

A fault wraps the honest op. Adding one means one function `apply(func, args, kwargs, compute)` and
one entry in `FAULTS`: return `compute(func, args, kwargs)` where the fault does not strike.
`compute` runs any aten op as the emulated backend does, with the faults listed after this one.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch

aten = torch.ops.aten


@dataclass(frozen=True)
class Fault:
    """One public defect of a backend, planted at the level of aten ops.

    Attributes:
        name: How it is switched on: `mps(faults=(name,))`.
        ops: The ops it rewrites, as overloads (`aten.baddbmm.out`) or all overloads of one
            (`aten.baddbmm`); in-place ops are named with their underscore.
        threads: Public threads that document it.
        affects: Versions and dtypes in which it was seen or read, and what is only inferred.
        apply: `apply(func, args, kwargs, compute)`, which returns what the op would return.
    """

    name: str
    ops: tuple[str, ...]
    threads: tuple[str, ...]
    affects: str
    apply: Callable


def leak_input(func, args, kwargs, compute):
    """Compute beta * input although beta is 0: 0 * NaN is NaN, 0 * inf is NaN, 0 * finite is 0."""
    if kwargs.get("beta", 1) != 0:
        return compute(func, args, kwargs)
    leaked = compute(aten.mul.Tensor, (args[0], 0), {})
    result = compute(func, args, kwargs)
    return compute(aten.add_.Tensor, (result, leaked), {})


def round_product_before_alpha(func, args, kwargs, compute):
    """Round batch1 @ batch2 to the tensors' own dtype before alpha scales it."""
    matrices, batch1, batch2 = args
    product = compute(aten.bmm.default, (batch1, batch2), {})
    scaled = compute(aten.mul.Tensor, (product, kwargs.get("alpha", 1)), {})
    # The same op over an inner dimension of zero is beta * input alone, faults of that included.
    no_terms = (matrices, batch1[:, :, :0], batch2[:, :0, :])
    result = compute(func, no_terms, kwargs)
    return compute(aten.add_.Tensor, (result, scaled), {})


def round_scores_before_scale(func, args, kwargs, compute):
    """Round Q.K^T to the tensors' own dtype, then scale in float32 and round again."""
    # B batch, H heads, L queries, S keys, D width
    names = ("query", "key", "value", "dropout_p", "is_causal")
    given = dict(zip(names, args, strict=False)) | kwargs
    query, key, value = given["query"], given["key"], given["value"]
    scale = given.get("scale") or query.shape[-1] ** -0.5
    keys = key.transpose(-2, -1)
    product = compute(aten.bmm.default, (query.flatten(0, 1), keys.flatten(0, 1)), {})
    scores = product.unflatten(0, query.shape[:2]).float() * scale  # B, H, L, S
    scores = scores.to(query.dtype).float()
    if given.get("attn_mask") is not None:
        scores = scores + given["attn_mask"].float()
    if given.get("is_causal"):
        allowed = torch.ones(scores.shape[-2:], dtype=torch.bool).tril()
        scores = scores.masked_fill(~allowed, float("-inf"))
    output = scores.softmax(-1) @ value.float()  # B, H, L, D
    return output.to(query.dtype), scores.logsumexp(-1)


def round_early(func, args, kwargs, compute):
    """Round Q.K^T before the scale, whichever op computes it; float32 has nothing to lose there."""
    if args[1].dtype not in (torch.float16, torch.bfloat16):
        return compute(func, args, kwargs)
    if func._schema.name.startswith("aten::baddbmm"):
        return round_product_before_alpha(func, args, kwargs, compute)
    return round_scores_before_scale(func, args, kwargs, compute)


FAULTS = {
    fault.name: fault
    for fault in (
        Fault(
            name="baddbmm-beta-zero",
            ops=("aten.baddbmm", "aten.baddbmm_"),
            threads=(
                "https://github.com/pytorch/pytorch/issues/187521",
                "https://github.com/pytorch/pytorch/pull/187522",
                "https://github.com/pytorch/pytorch/issues/194442",
                "https://github.com/huggingface/diffusers/issues/11229",
                "https://github.com/huggingface/diffusers/issues/14438",
            ),
            affects=(
                "MPS through torch 2.13.0, in float16, bfloat16 and float32 (read in the macOS"
                " wheels: 2.13.0 always builds beta * input, 2.14.0 branches on beta == 0)."
            ),
            apply=leak_input,
        ),
        Fault(
            name="score-rounding",
            ops=(
                "aten.baddbmm",
                "aten.baddbmm_",
                "aten._scaled_dot_product_flash_attention_for_cpu",
            ),
            threads=(
                "https://github.com/pytorch/pytorch/issues/119131",
                "https://github.com/pytorch/pytorch/issues/160841",
            ),
            affects=(
                "MPS in float16 and bfloat16, inferred from the source of its attention and"
                " baddbmm and not confirmed on hardware, where MPSGraph may fuse the two steps."
            ),
            apply=round_early,
        ),
    )
}

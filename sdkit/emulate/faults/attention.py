"""Attention and softmax: early rounding, lost keys, strides ignored, rows that attend nowhere."""

import torch

from sdkit.emulate.faults.fault import PYTORCH, Fault
from sdkit.emulate.faults.products import aten
from sdkit.emulate.faults.views import read_as_contiguous
from sdkit.emulate.float16 import HALVES

# B batch, H heads, L queries, S keys, D width
SDPA = "aten._scaled_dot_product_flash_attention_for_cpu"
KEY_TILE = 32  # pytorch#169222
SUM_LANES = 4


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
    if args[1].dtype not in HALVES:
        return compute(func, args, kwargs)
    if func._schema.name.startswith("aten::baddbmm"):
        return round_product_before_alpha(func, args, kwargs, compute)
    return round_scores_before_scale(func, args, kwargs, compute)


def misread_last_keys(func, args, kwargs, compute):
    """Take the values of the first keys for those of the keys behind the last full tile."""
    query, key, value, *others = args
    tail = key.shape[-2] % KEY_TILE
    if tail and key.shape[-2] > KEY_TILE:
        value = torch.cat([value[..., :-tail, :], value[..., :tail, :]], dim=-2)
    return compute(func, (query, key, value, *others), kwargs)


def ignore_permutation(func, args, kwargs, compute):
    """Read queries, keys and values as if they lay in memory in the order of their shape."""
    return compute(func, (*map(read_as_contiguous, args[:3]), *args[3:]), kwargs)


def answer_masked_rows_with_nan(func, args, kwargs, compute):
    """Divide by the sum of no weights where a query may attend to no key."""
    output, logsumexp = compute(func, args, kwargs)
    mask = kwargs.get("attn_mask")
    if mask is not None:
        is_masked = mask.eq(float("-inf")).all(-1, keepdim=True)  # broadcasts to B, H, L, 1
        output = output.masked_fill(is_masked, float("nan"))
    return output, logsumexp


def sum_in_own_dtype(func, args, kwargs, compute):
    """Sum the exponentials of a softmax in the tensor's own dtype, a few lanes side by side."""
    scores, dim = args[:2]
    if scores.dtype not in HALVES:
        return compute(func, args, kwargs)
    weights = (scores.float() - scores.float().amax(dim, keepdim=True)).exp().to(scores.dtype)
    lanes = torch.nn.functional.pad(weights.movedim(dim, -1), (0, -weights.shape[dim] % SUM_LANES))
    total = torch.zeros_like(lanes[..., :SUM_LANES])
    for terms in lanes.split(SUM_LANES, -1):
        total = total + terms
    total = total.float().sum(-1, keepdim=True).movedim(-1, dim)
    return (weights.float() / total).to(scores.dtype)


FAULTS = (
    Fault(
        name="score-rounding",
        ops=("aten.baddbmm", "aten.baddbmm_", SDPA),
        threads=(f"{PYTORCH}/119131", f"{PYTORCH}/160841"),
        affects=(
            "MPS in float16 and bfloat16, inferred from the source of its attention and"
            " baddbmm and not confirmed on hardware, where MPSGraph may fuse the two steps."
        ),
        apply=round_early,
    ),
    Fault(
        name="sdpa-last-keys",
        ops=(SDPA,),
        threads=(f"{PYTORCH}/169222",),
        affects=(
            "MPS until November 2025, numbers of keys that 32 does not divide, in the vector"
            " kernel. What garbage it reads is not known; here the values of the first keys."
        ),
        apply=misread_last_keys,
    ),
    Fault(
        name="sdpa-permuted",
        ops=(SDPA,),
        threads=(f"{PYTORCH}/181133", f"{PYTORCH}/170837", f"{PYTORCH}/163597"),
        affects=(
            "MPS in torch 2.8.0 and later, batches of more than one and heads that are views, in"
            " its own Metal kernels (few queries, widths of 64, 96 or 128)."
        ),
        apply=ignore_permutation,
    ),
    Fault(
        name="sdpa-masked-row",
        ops=(SDPA,),
        threads=(f"{PYTORCH}/156707", f"{PYTORCH}/103963"),
        affects="MPS as reported in June 2025 (closed since), where CPU and CUDA answer zero.",
        apply=answer_masked_rows_with_nan,
    ),
    Fault(
        name="softmax-narrow-sum",
        ops=("aten._softmax",),
        threads=(f"{PYTORCH}/190791", f"{PYTORCH}/96602"),
        affects=(
            "MPS attention in float16 and bfloat16: 2.4 % at 14,000 tokens was reported. In which"
            " order it sums is not known; here in four lanes, which is off by more."
        ),
        apply=sum_in_own_dtype,
    ),
)

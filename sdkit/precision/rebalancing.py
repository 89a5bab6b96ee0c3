"""Moves powers of two between the weights of a model, so that its activations fit float16.

float32 outputs stay equal to the last bit; see `sdkit.precision.streams` for what moves and why.
"""

import math
from dataclasses import replace
from numbers import Integral
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL

from sdkit.generation.request import check_number
from sdkit.loading.rebalanced import install_checks, remove_checks
from sdkit.loading.recipe import describe_model, find_differences
from sdkit.loading.sidecar import Shift, find_shift, measure_largest
from sdkit.precision.exponents import MARGIN_BITS, choose_exponents, find_needs
from sdkit.precision.headroom import (
    OVERFLOW,
    Headroom,
    find_exponents,
    find_overflowing_weights,
    make_ops,
)
from sdkit.precision.movable import check_overflow, check_weights, find_moved
from sdkit.precision.op_ranges import OpRanges
from sdkit.precision.rebalance_report import RebalanceReport
from sdkit.precision.streams import Streams, find_streams
from sdkit.precision.synthetic import LATENT_PIXELS, make_calls
from sdkit.validation import ValidationError

REASONS = (
    ("time_embedding", "a bare SiLU reads it"),
    ("add_embedding", "a bare SiLU reads it"),
    (".ff.net.0", "GELU reads the gate"),
    (".to_q", "the softmax fixes Q.K^T"),
    (".to_k", "the softmax fixes Q.K^T"),
    (".attn", "the softmax fixes Q.K^T"),
    (".attentions", "the softmax fixes Q.K^T"),
    ("conv_out", "it is read raw"),
    ("quant_conv", "it is read raw"),
)


def rebalance(model, headroom: Headroom | None = None, *, seed=0) -> RebalanceReport:
    """Moves powers of two within a float32 model, in place, until its streams fit float16.

    The least exponents are chosen that bring each stream to a quarter of float16's maximum, with at
    most 1 % of any weight made float16-subnormal. A model that fits is left alone. Cast it after:
    `model.to(torch.float16)` keeps the eps. Save it with `save_rebalanced`.

    Args:
        model: An AutoencoderKL or a UNet2DConditionModel of Stable Diffusion 1.x, 2.x or XL.
        headroom: Of a pipeline with this very model; None measures on synthetic latents.
        seed: Of the synthetic latents.

    Returns:
        A RebalanceReport; `left` and `wanted` are what is handed on to `plan_precision`.

    Raises:
        ValidationError: Another class or configuration; weights not in float32, tied, quantised or
            not finite; adapters; a headroom of another model. The model is as it was.
    """
    if not isinstance(headroom, Headroom | None):
        raise ValidationError(
            f"headroom: got a {type(headroom).__name__}, expected what measure_headroom returns."
        )
    check_number("seed", seed)
    streams = find_streams(model)
    check_weights(model, streams)
    root = "vae" if isinstance(model, AutoencoderKL) else "unet"
    calls = make_calls(model, seed=seed)
    if headroom is None:
        headroom = measure_calls(model, root, calls, seed)
    check_headroom(headroom, model, root)
    headroom = bring_up_to_date(headroom, model, streams, root)
    largest = find_largest(headroom, streams, root)
    unseen = tuple(name for name in streams.names if name not in largest)
    if unseen:
        headroom = complete(headroom, measure_calls(model, root, calls, seed))
        largest = find_largest(headroom, streams, root)
    choice = choose_exponents(model, streams, find_needs(largest))
    before = run_calls(calls) if choice.exponents else []
    apply_exponents(model, streams, choice.exponents)
    error = measure_error_without_sidecar(model, calls, before)
    left = tuple(find_left(headroom, model, streams, root, choice))
    return RebalanceReport(
        model_class=type(model).__name__,
        measured_on=headroom.source,
        margin_bits=MARGIN_BITS,
        exponents=choice.exponents,
        wanted=choice.wanted,
        bounds=choice.bounds,
        left=left,
        on_synthetic=unseen,
        error_without_sidecar=error,
        notices=tuple(settle_upcast(model, is_changed=bool(choice.exponents), left=left)),
    )


def amplify(model, exponent: int) -> RebalanceReport:
    """Multiplies every stream of a float32 model by 2^exponent, in place: large activations.

    The inverse of `rebalance`, to reproduce what it cures: float32 outputs stay equal to the last
    bit, and every weight stays finite in float16, so that the activations alone are the fault.

    Args:
        model: As for `rebalance`.
        exponent: At least 1.

    Returns:
        A RebalanceReport.

    Raises:
        ValidationError: As for `rebalance`; or a weight would overflow in float16: which, and the
            greatest exponent that it allows.
    """
    if not isinstance(exponent, Integral) or isinstance(exponent, bool) or exponent < 1:
        raise ValidationError(f"exponent={exponent!r}: expected a whole number of at least 1.")
    streams = find_streams(model)
    check_weights(model, streams)
    exponents = dict.fromkeys(streams.names, int(exponent))
    check_overflow(model, streams, exponents)
    calls = make_calls(model)
    before = run_calls(calls)
    apply_exponents(model, streams, exponents)
    return RebalanceReport(
        model_class=type(model).__name__,
        measured_on="nothing, amplified as asked",
        margin_bits=MARGIN_BITS,
        exponents=exponents,
        wanted={},
        bounds={},
        left=(),
        on_synthetic=(),
        error_without_sidecar=measure_error_without_sidecar(model, calls, before),
    )


def save_rebalanced(model, folder) -> Path:
    """Saves a model with its sidecar, which `load_pipeline` applies.

    Args:
        model: As `rebalance` left it.
        folder: Such as `Path(pipeline_folder) / "vae"`.

    Returns:
        The folder.
    """
    model.save_pretrained(folder)
    return Path(folder)


@torch.no_grad()
def apply_exponents(model, streams: Streams, exponents):
    """Moves weights, biases and eps, and keeps account of it on the model."""
    if not exponents:
        return
    for layer in streams.layers:
        for _, tensor, exponent in find_moved(model, layer, exponents):
            if exponent:
                tensor *= 2.0**exponent
    old = find_shift(model)
    total = dict(old.exponents) if old else {}
    original_eps = dict(old.original_eps) if old else {}
    for norm in streams.norms:
        module = model.get_submodule(norm.path)
        original_eps.setdefault(norm.path, module.eps)
        module.eps *= 4.0 ** exponents.get(norm.reads, 0)
    for stream, exponent in exponents.items():
        total[stream] = total.get(stream, 0) + exponent
    total = {stream: exponent for stream, exponent in total.items() if exponent}
    remove_checks(model)
    if not total:
        return
    moved = [n for n in streams.norms if total.get(n.reads)]
    install_checks(
        model,
        Shift(
            exponents=total,
            skips=[total.get(stream, 0) for stream in streams.skips],
            middle=total.get(streams.middle, 0),
            eps={norm.path: model.get_submodule(norm.path).eps for norm in moved},
            original_eps={norm.path: original_eps[norm.path] for norm in moved},
            largest={
                layer.path: measure_largest(model, layer.path)
                for layer in streams.layers
                if total.get(layer.reads, 0) != total.get(layer.writes, 0)
            },
        ),
    )


def measure_calls(model, root, calls, seed) -> Headroom:
    """A headroom of synthetic calls; what runs in no module does not count."""
    ranges = OpRanges({root: model})
    with ranges.installed():
        run_calls(calls)
    return Headroom(
        ops=make_ops({key: value for key, value in ranges.records.items() if key[1]}),
        overflowing_weights=find_overflowing_weights({root: model}),
        prompts=(),
        seed=seed,
        source=f"synthetic latents {LATENT_PIXELS}x{LATENT_PIXELS}, seed {seed}",
        exponents=find_exponents({root: model}),
    )


def bring_up_to_date(headroom: Headroom, model, streams: Streams, root) -> Headroom:
    """A headroom of a model as it is now, where it was rebalanced since it was measured."""
    now = find_exponents({root: model}).get(root, {})
    then = headroom.exponents.get(root, {})
    if now == then:
        return headroom

    def move(op):
        stream = streams.find_stream(op.module.partition(".")[2], op.op, op.index)
        by = 2.0 ** (now.get(stream, 0) - then.get(stream, 0))
        return replace(op, largest=tuple(value * by for value in op.largest))

    ops = tuple(move(op) if op.stage == root else op for op in headroom.ops)
    return replace(headroom, ops=ops, exponents=headroom.exponents | {root: now})


def check_headroom(headroom: Headroom, model, root) -> Headroom:
    """Returns a headroom that was not measured on another model of the same architecture.

    Raises:
        ValidationError: It was. Weights that were moved since cannot be compared.
    """
    differing = find_differences(headroom.fingerprint.get(root, {}), describe_model(model))
    if find_exponents({root: model}).get(root) != headroom.exponents.get(root):
        differing = [name for name in differing if name != "values"]
    if differing:
        raise ValidationError(
            f"headroom: was measured on another {root} ({', '.join(differing)}). Measure this one "
            "with measure_headroom, or leave it out."
        )
    return headroom


def complete(headroom: Headroom, synthetic: Headroom) -> Headroom:
    """A headroom with the modules that its run did not reach."""
    reached = {op.module for op in headroom.ops}
    added = tuple(op for op in synthetic.ops if op.module not in reached)
    return replace(headroom, ops=headroom.ops + added)


def run_calls(calls) -> list[torch.Tensor]:
    """What the synthetic calls return."""
    with torch.no_grad():
        return [call() for call in calls]


def find_largest(headroom: Headroom, streams: Streams, root) -> dict[str, float]:
    """{stream: greatest |x|} of the streams that a headroom has ops of."""
    largest = {}
    for op in headroom.ops:
        if op.stage == root:
            stream = streams.find_stream(op.module.partition(".")[2], op.op, op.index)
            if stream:
                largest[stream] = max(largest.get(stream, 0.0), op.largest_of_all)
    if not largest:
        raise ValidationError(
            f"headroom: has no op of this {root}, expected the headroom of a pipeline with this "
            "very model. Measure it again, or leave it out."
        )
    return largest


def find_left(headroom: Headroom, model, streams: Streams, root, choice):
    """Yields (module, op, largest |x| now, why) of what still overflows float16."""
    halves = {layer.path for layer in streams.layers if layer.is_half}
    for op in headroom.ops:
        path = op.module.partition(".")[2]
        if op.stage != root or path in halves:  # of a half layer the parts of the split count
            continue
        stream = streams.find_stream(path, op.op, op.index)
        largest = op.largest_of_all * 2.0 ** choice.exponents.get(stream, 0)
        if largest >= OVERFLOW["float16"]:
            yield op.module, op.op, largest, explain(path, stream, choice)
    for name in find_overflowing_weights({root: model}):
        largest = float(model.get_parameter(name.partition(".")[2]).detach().abs().max())
        yield name.rpartition(".")[0], "weight", largest, "the weight itself overflows"


def explain(path, stream, choice) -> str:
    """Why an output cannot be brought down."""
    if stream:
        return f"bound by {choice.bounds.get(stream, 'its weights')}"
    return next((why for part, why in REASONS if part in f".{path}"), "others read it raw")


def measure_error_without_sidecar(model, calls, expected) -> float:
    """Relative RMS error of the outputs if the norms had the eps that diffusers gives them."""
    shift = find_shift(model)
    if shift is None or not expected:
        return 0.0
    for path, eps in shift.original_eps.items():
        model.get_submodule(path).eps = eps
    try:
        found = run_calls(calls)
    finally:
        for path, eps in shift.eps.items():
            model.get_submodule(path).eps = eps
    errors = sum(sum_squares(f - e) for f, e in zip(found, expected, strict=True))
    return math.sqrt(errors / sum(map(sum_squares, expected))) if errors else 0.0


def sum_squares(values: torch.Tensor) -> float:
    """In float64, on the host: MPS has none."""
    return float(np.square(values.cpu().numpy(), dtype=np.float64).sum())


def settle_upcast(model, *, is_changed, left):
    """Yields what became of a VAE's `force_upcast`, which would lift it to float32 all the same."""
    if not (isinstance(model, AutoencoderKL) and model.config.get("force_upcast")):
        return
    if is_changed and not left:
        model.register_to_config(force_upcast=False)
        yield "force_upcast switched off: SDXL's pipelines would have lifted this VAE to float32"
    elif left:
        yield "force_upcast stays on: something still overflows in float16"
    else:
        yield "force_upcast is on, though this VAE fits float16 on what was measured"

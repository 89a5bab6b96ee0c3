"""Whether a model's weights can be moved by powers of two, asked before anything is touched."""

import math

import torch
from peft.tuners.tuners_utils import BaseTunerLayer

from sdkit.precision.exponents import FLOAT16_MAX
from sdkit.precision.streams import Streams
from sdkit.validation import ValidationError, is_finite


def check_weights(model, streams: Streams):
    """Refuses a model whose weights cannot be moved exactly, before anything is touched."""
    name = type(model).__name__
    where = {}
    for module in model.modules():
        if isinstance(module, BaseTunerLayer):
            raise ValidationError(
                f"{name}: has adapter layers ({type(module).__name__}). Merge them first: "
                "`pipe.fuse_lora(); pipe.unload_lora_weights()`."
            )
    for path, parameter in model.named_parameters(remove_duplicate=False):
        dtype = str(parameter.dtype).removeprefix("torch.")
        if parameter.is_meta or parameter.dtype is not torch.float32:
            state = "has no data" if parameter.is_meta else f"is {dtype}"
            raise ValidationError(
                f"{name}: {path} {state}, expected float32: a cast or quantised weight has "
                'lost bits that no power of two gives back. Load with dtype="float32", '
                "rebalance, then cast."
            )
        other = where.setdefault(parameter.data_ptr(), path)
        if other != path and parameter.numel():
            raise ValidationError(
                f"{name}: {path} and {other} are one tensor (tied), expected weights that can move "
                "apart. Copy one of them first."
            )
        if not is_finite(parameter):
            raise ValidationError(
                f"{name}: {path} holds NaN or Inf, expected finite weights. Load the model again."
            )
    for layer in streams.layers:
        _check_kind(
            name, model, layer.path, (torch.nn.Linear, torch.nn.Conv2d),
            'Linear or Conv2d in float32. Load the model unquantised, with dtype="float32".',
        )  # fmt: skip
    for norm in streams.norms:
        _check_kind(
            name, model, norm.path, (torch.nn.GroupNorm, torch.nn.LayerNorm),
            "GroupNorm or LayerNorm, which divide by what their input was multiplied with.",
        )  # fmt: skip


def _check_kind(name, model, path, kinds, expected):
    kind = type(model.get_submodule(path))
    if kind not in kinds:
        raise ValidationError(f"{name}: {path} is a {kind.__name__}, expected {expected}")


def check_overflow(model, streams: Streams, exponents):
    """Refuses exponents at which a weight or bias would overflow in float16."""
    for layer in streams.layers:
        for kind, tensor, exponent in find_moved(model, layer, exponents):
            largest = float(tensor.detach().abs().max())
            possible = math.floor(math.log2(FLOAT16_MAX / largest)) if largest else exponent
            if exponent > possible:
                raise ValidationError(
                    f"{layer.path}.{kind}: |x| is up to {largest:.4g}, so at 2^{exponent} it would "
                    f"overflow in float16, which is another fault. Expected an exponent of at most "
                    f"{possible}."
                )


def find_moved(model, layer, exponents):
    """(kind, tensor, exponent) of the weight and bias of a layer, of GEGLU the value half."""
    module = model.get_submodule(layer.path)
    reads, writes = exponents.get(layer.reads, 0), exponents.get(layer.writes, 0)
    for kind, exponent in (("weight", writes - reads), ("bias", writes)):
        tensor = getattr(module, kind)
        if tensor is not None:
            yield kind, tensor[: len(tensor) // 2] if layer.is_half else tensor, exponent

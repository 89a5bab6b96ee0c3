"""`sdkit_rebalance.json` beside a model's config: the eps of its norms, which have no place there.

diffusers builds a model's norms with the eps of its code. A rebalanced model that is loaded without
its own eps still runs, a little wrong; how much is in the RebalanceReport.
"""

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from sdkit.run_folder import replace_file
from sdkit.validation import ValidationError

SIDECAR_NAME = "sdkit_rebalance.json"
VERSION = 1
MARK = "_sdkit_rebalance"
TOLERANCE = 0.01  # bfloat16 rounds a weight by at most 0.4 %


@dataclass(frozen=True)
class Shift:
    """How a model differs from the one that it was made from.

    Attributes:
        exponents: {stream: e}, see `sdkit.precision.streams`.
        skips: Of a UNet the exponent of each skip, in the order of a ControlNet's residuals.
        middle: Of a UNet the exponent of the mid block's output.
        eps: {path of a norm: its eps now}.
        original_eps: {path of a norm: its eps before}.
        largest: {path of a layer whose weight moved: its greatest |weight|, to know it again}.
    """

    exponents: dict[str, int]
    skips: list[int]
    middle: int
    eps: dict[str, float]
    original_eps: dict[str, float]
    largest: dict[str, float]


def find_shift(model) -> Shift | None:
    """The shift of a model that was rebalanced, amplified, or loaded as such."""
    return getattr(model, MARK, None)


def save_sidecar(model, folder) -> Path:
    """Writes the sidecar of a shifted model into the folder of its config."""
    path = Path(folder) / SIDECAR_NAME
    content = {"version": VERSION, "class": type(model).__name__, **asdict(find_shift(model))}
    with replace_file(path) as temporary:
        temporary.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    return path


def read_sidecar(model, path) -> Shift:
    """Reads a sidecar and checks that it belongs to this model and these weights.

    Raises:
        ValidationError: It is of another class, architecture or set of weights, or no sidecar.
    """
    where = f"{path.parent.name}/{path.name}"
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
        version, name = content.pop("version"), content.pop("class")
        shift = Shift(**content)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValidationError(
            f"{where}: not a sidecar of sdkit's rebalance ({type(error).__name__}: {error}). "
            "Rebalance the original model again, or delete the file if the weights are original."
        ) from error
    if (version, name) != (VERSION, type(model).__name__):
        raise ValidationError(
            f"{where}: version {version} for {name}, expected version {VERSION} for "
            f"{type(model).__name__}. Rebalance the original model again."
        )
    for layer, largest in shift.largest.items():
        found = measure_largest(model, layer, where)
        if abs(found - largest) > TOLERANCE * largest:
            raise ValidationError(
                f"{where}: belongs to other weights: |{layer}.weight| is up to {found:.6g}, "
                f"expected {largest:.6g}. Copy weights and sidecar together, or delete the sidecar "
                "if these are the original weights."
            )
    return shift


def measure_largest(model, path, where="") -> float:
    """Greatest |weight| of a layer."""
    try:
        weight = model.get_submodule(path).weight
    except AttributeError as error:
        raise ValidationError(
            f"{where}: {type(model).__name__} has no {path}; the sidecar is of another "
            "architecture. Copy weights, config and sidecar together."
        ) from error
    return float(weight.detach().abs().max())

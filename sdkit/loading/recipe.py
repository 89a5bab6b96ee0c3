"""A precision recipe: which modules stay float32 while all else is float16, found by a plan.

Inside a component every layer takes what comes to it in its own dtype; what a float32 layer makes
stays float32 until a float16 layer takes it, so a residual stream that float16 cannot hold is
carried by the sums in between, which torch promotes.
"""

import hashlib
import json
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, fields
from numbers import Real
from pathlib import Path

import torch

from sdkit.emulate.mode import suspended
from sdkit.loading.border_casts import MARK, install_border_casts, map_floats, remove_border_casts
from sdkit.loading.dtype_policy import DTYPES
from sdkit.loading.lifting import list_tensors, restored
from sdkit.loading.modules import find_models, find_module
from sdkit.run_folder import replace_file
from sdkit.validation import ValidationError

RECIPE_VERSION = 1
LISTS = ("float32", "prompts")  # fields that JSON gives as lists
NUMBERS = (
    "psnr_db", "healthy_db", "tolerance_db", "trials", "weight_bytes", "float32_weight_bytes",
)  # fmt: skip
FINGERPRINT = {"class", "shapes", "values"}
SAMPLED_VALUES = 4  # of each tensor, for the fingerprint


@dataclass(frozen=True)
class Recipe:
    """What to keep in float32, and how it was found.

    Attributes:
        version: Of this format.
        model: Name of the model it was made for.
        fingerprint: {component: what identifies it}; see `take_fingerprint`.
        dtype: Of everything else: "float16" or "bfloat16".
        float32: Dotted paths of components and modules that stay float32, in their order.
        psnr_db: Least PSNR of an image to the float32 reference with this recipe.
        healthy_db: The same of `dtype` without a limit of range: what rounding alone costs.
        tolerance_db: How far below `healthy_db` an image may be.
        trials: Runs that the search took.
        bisect_trials: Runs that a plain bisection over the order of modules takes; None if it was
            not tried.
        weight_bytes: Of all weights with this recipe.
        float32_weight_bytes: Of all weights in float32.
        prompts: Prompts it was tried on.
        made_on: Device, torch version and emulation.
    """

    version: int
    model: str
    fingerprint: dict
    dtype: str
    float32: tuple[str, ...]
    psnr_db: float
    healthy_db: float
    tolerance_db: float
    trials: int
    bisect_trials: int | None
    weight_bytes: int
    float32_weight_bytes: int
    prompts: tuple[str, ...]
    made_on: dict

    def __str__(self):
        """A few lines: what stays, what it costs, how good it is."""
        kept = ", ".join(self.float32) or "nothing"
        share = self.weight_bytes / self.float32_weight_bytes
        return (
            f"{self.model}: {self.dtype}, in float32: {kept}\n"
            f"{self.weight_bytes / 2**20:.1f} MiB of weights, {share:.2f}x of float32's; "
            f"{self.psnr_db:.1f} dB to float32, where rounding alone leaves "
            f"{self.healthy_db:.1f} dB; found in {self.trials} runs"
        )

    def to_json(self) -> str:
        """Returns the recipe as JSON text."""
        return json.dumps(asdict(self), indent=2) + "\n"

    @classmethod
    def from_json(cls, text: str) -> "Recipe":
        """Returns the recipe that `to_json` wrote.

        Raises:
            ValidationError: It is none, or of another version.
        """
        try:
            content = json.loads(text)
            version = content.get("version")
        except (json.JSONDecodeError, AttributeError) as error:
            raise ValidationError(f"recipe: no such JSON ({error}).") from error
        names = {field.name for field in fields(cls)}
        if version != RECIPE_VERSION or set(content) != names:
            raise ValidationError(
                f"recipe: version {version!r}, fields {sorted(set(content) ^ names)} differ. "
                f"Expected what plan_precision wrote, version {RECIPE_VERSION}."
            )
        lists = {name: tuple(check_strings(name, content[name])) for name in LISTS}
        if content["dtype"] not in ("float16", "bfloat16"):
            seen = content["dtype"]
            raise ValidationError(f"recipe: dtype {seen!r}, expected float16 or bfloat16.")
        fingerprint = content["fingerprint"]
        is_whole = isinstance(fingerprint, dict) and all(
            isinstance(parts, dict) and set(parts) == FINGERPRINT for parts in fingerprint.values()
        )
        if not is_whole or not fingerprint:  # without one it would pass for any model's
            raise ValidationError("recipe: fingerprint is damaged. Run plan_precision again.")
        for name in NUMBERS:
            if not isinstance(content[name], Real):
                raise ValidationError(
                    f"recipe: {name} is {content[name]!r:.60}, expected a number. Run "
                    "plan_precision again."
                )
        return cls(**content | lists)

    def save(self, path) -> Path:
        """Writes the recipe, whole or not at all.

        Raises:
            ValidationError: It cannot be written there.
        """
        path = Path(path)
        try:
            with replace_file(path) as temporary:
                temporary.write_text(self.to_json(), encoding="utf-8")
        except OSError as error:
            raise ValidationError(
                f"{path}: no recipe can be written there ({error.strerror}). Choose a file in a "
                "folder that is there."
            ) from error
        return path

    @classmethod
    def load(cls, path) -> "Recipe":
        """Returns the recipe in a file.

        Raises:
            ValidationError: It cannot be read, or holds none.
        """
        try:
            return cls.from_json(Path(path).read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError, TypeError) as error:
            raise ValidationError(f"{path}: no recipe can be read there ({error}).") from error


def check_strings(name, value) -> list[str]:
    """Returns a field of a recipe that must be a list of strings."""
    if isinstance(value, list) and all(isinstance(item, str) for item in value):
        return value
    raise ValidationError(
        f"recipe: {name} is {value!r:.60}, expected a list of strings. Run plan_precision again."
    )


def take_fingerprint(pipe) -> dict:
    """{component: {"class", "shapes", "values"}}: which model this is, whatever its dtype.

    The values are a few of each tensor, as float16; of a bfloat16 component they are None, for
    bfloat16 has rounded them differently, and of shapes without values (the meta device) as well.
    """
    return {name: describe_model(component) for name, component in find_models(pipe).items()}


def describe_model(model) -> dict:
    """The fingerprint of one component; what torch.compile wraps is the same model."""
    model = getattr(model, "_orig_mod", model)
    shapes, values, unknown = hashlib.sha256(), hashlib.sha256(), False
    for name, parameter in sorted(model.named_parameters()):
        shapes.update(f"{name}{tuple(parameter.shape)}".encode())
        if parameter.is_meta or parameter.dtype is torch.bfloat16:
            unknown = True
            continue
        sample = parameter.detach().flatten()[:SAMPLED_VALUES].cpu()
        values.update(sample.to(torch.float16).view(torch.uint8).numpy().tobytes())
    return {
        "class": type(model).__name__,
        "shapes": shapes.hexdigest()[:16],
        "values": None if unknown else values.hexdigest()[:16],
    }


def find_differences(expected: dict, found: dict) -> list[str]:
    """In what two models' fingerprints differ, as far as both are known."""
    pairs = {name: {value, found.get(name)} for name, value in expected.items()}
    return [name for name, pair in pairs.items() if len(pair) > 1 and None not in pair]


def check_recipe(pipe, recipe: Recipe) -> Recipe:
    """Returns a recipe that belongs to a pipeline.

    Raises:
        ValidationError: It was made for another model, or names modules that are not there.
    """
    present = take_fingerprint(pipe)
    for name, expected in recipe.fingerprint.items():
        found = present.get(name, {})
        differing = find_differences(expected, found)
        if not found or differing:
            raise ValidationError(
                f"recipe: made for {recipe.model}; this {name} is another "
                f"({', '.join(differing) or 'missing'}). Plan this model with plan_precision."
            )
    for path in recipe.float32:
        find_module(pipe, path)
    return recipe


@contextmanager
def mixed_precision(pipe, float32, dtype=torch.float16):
    """Runs the body in `dtype` with some modules in float32; the very tensors come back after.

    Args:
        pipe: A diffusers pipeline.
        float32: Dotted paths of what stays float32.
        dtype: Of all else.
    """
    with ExitStack() as undo:
        models = find_models(pipe).values()
        undo.enter_context(restored([t for model in models for t in list_tensors(model)]))
        had_casts = any(hasattr(component, MARK) for component in models)
        for handle in set_precision(pipe, float32, dtype):
            undo.callback(handle.remove)
        if not had_casts:
            undo.callback(remove_border_casts, pipe)
        yield


def apply_recipe(pipe, recipe: Recipe):
    """Puts a pipeline into the precision of a recipe, to stay.

    Args:
        pipe: A diffusers pipeline, best in float32 still: what has been float16 stays rounded.
        recipe: Made for this very model.

    Returns:
        The pipeline.

    Raises:
        ValidationError: The recipe belongs to another model; nothing was changed.
    """
    check_recipe(pipe, recipe)
    set_precision(pipe, recipe.float32, DTYPES[recipe.dtype])
    return pipe


def set_precision(pipe, float32, dtype) -> list:
    """Casts weights and installs casts at the layers; returns the handles of the latter."""
    kept = {id(t) for path in float32 for t in list_tensors(find_module(pipe, path))}
    keep_layers_whole(pipe, kept)
    handles = []
    for model in find_models(pipe).values():
        with suspended():  # a cast rounds alike outside of an emulation, in a tenth of the time
            for tensor in list_tensors(model):
                tensor.data = tensor.data.to(torch.float32 if id(tensor) in kept else dtype)
        if len({parameter.dtype for parameter in model.parameters()}) > 1:
            handles += [cast_at(layer) for layer in model.modules() if weight_of(layer) is not None]
    install_border_casts(pipe)
    return handles


def keep_layers_whole(pipe, kept):
    """Adds the tensors of each layer of which one is kept: a tied weight belongs to several."""
    layers = [
        {id(t) for t in (*layer._parameters.values(), *layer._buffers.values()) if t is not None}
        for model in find_models(pipe).values()
        for layer in model.modules()
    ]
    while partly := [layer - kept for layer in layers if layer & kept and layer - kept]:
        kept.update(*partly)


def cast_at(layer):
    """Lets a layer take its floating inputs in the dtype of its own weights."""

    def cast(layer, args, kwargs):
        def take(tensor):
            return tensor.to(weight_of(layer).dtype)

        return map_floats(args, take), map_floats(kwargs, take)

    return layer.register_forward_pre_hook(cast, with_kwargs=True)


def weight_of(layer) -> torch.nn.Parameter | None:
    """The first floating parameter that a layer holds itself."""
    parameters = layer._parameters.values()
    return next((p for p in parameters if p is not None and p.is_floating_point()), None)


def count_bytes(pipe) -> int:
    """Bytes of all floating weights as they are."""
    return sum(
        parameter.numel() * parameter.element_size()
        for model in find_models(pipe).values()
        for parameter in model.parameters()
    )

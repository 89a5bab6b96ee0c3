"""Which files a model name means, and whether they can be loaded: asked before anything is loaded.

diffusers would fall back to pickled weights, to freshly initialised ones or to a traceback of forty
lines; here each of these is one line that says what to do.
"""

import importlib
import json
import math
from dataclasses import dataclass, replace
from pathlib import Path

import diffusers
import torch
from diffusers import DiffusionPipeline
from safetensors import SafetensorError, safe_open

from sdkit.loading.single_file import describe_hub_failure, find_config_folder
from sdkit.validation import ValidationError

# Gone from the Hub in 2024; the live copies are these.
MINI_ID = "sdkit/mini"  # what records call the bundled model
RENAMED = {
    "runwayml/stable-diffusion-v1-5": "stable-diffusion-v1-5/stable-diffusion-v1-5",
    "runwayml/stable-diffusion-inpainting": "stable-diffusion-v1-5/stable-diffusion-inpainting",
}
PICKLED = (".bin", ".ckpt", ".pt", ".pth")
HOW_TO_CONVERT = (
    "Pickled weights can run code, so they are not opened here. Where you trust their origin, "
    "convert them once with diffusers: `DiffusionPipeline.from_pretrained(folder)` (for a single "
    "file `StableDiffusionPipeline.from_single_file(file)`), then "
    "`.save_pretrained(new_folder, safe_serialization=True)`, and load the new folder."
)


@dataclass(frozen=True)
class Checkpoint:
    """A model on this disk, looked at and fit to be loaded.

    Attributes:
        asked: The model as the caller named it.
        resolved: What that turned out to mean, for reports.
        path: A folder with a model_index.json, or a single .safetensors file.
        config_folder: The folder with the model_index.json; of a single file a folder beside it.
        pipeline_class: The name of the diffusers class in that index.
        components: Names of the parts that have weights.
        weight_files: All safetensors files.
        notices: What was changed on the way.
    """

    asked: str
    resolved: str
    path: Path
    config_folder: Path
    pipeline_class: str
    components: tuple
    weight_files: tuple
    notices: tuple = ()

    @property
    def is_single_file(self):
        """Whether all components are in one .safetensors file."""
        return self.path != self.config_folder


def find_checkpoint(model, *, variant=None, config=None, local_files_only=False):
    """Finds a model on disk, in the Hub's cache or on the Hub, and looks at its files.

    Args:
        model: "mini" (the bundled one), a folder, a .safetensors file or a Hub id "owner/name".
        variant: Such as "fp16": take the `*.fp16.safetensors` files where there are any.
        config: For a single file alone: a pipeline folder or Hub id of the same architecture, whose
            configuration and tokenizer it takes. Left out, the Hub is asked for the likely one.
        local_files_only: Do not ask the Hub.

    Returns:
        A Checkpoint.

    Raises:
        ValidationError: It is not there, not a pipeline, pickled, incomplete or corrupt.
    """
    asked = str(model)
    path = Path(asked)
    is_mini = asked in ("mini", MINI_ID)
    if not is_mini and path.is_file():
        return _look_at_file(path, asked, variant, config, local_files_only)
    if config is not None:
        raise ValidationError(f"{asked}: config={str(config)!r} is for single files only.")
    if is_mini:
        return replace(_look_at_folder(_find_mini(), asked, variant), resolved=MINI_ID)
    if path.is_dir():
        return _look_at_folder(path, asked, variant)
    looks_like_id = asked.count("/") == 1 and not asked.startswith((".", "/", "~"))
    if isinstance(model, Path) or not looks_like_id or path.suffix in (".safetensors", *PICKLED):
        raise ValidationError(
            f"{asked}: no such file or folder. Expected mini, a folder with a model_index.json, a "
            ".safetensors file or a Hub id such as stable-diffusion-v1-5/stable-diffusion-v1-5."
        )
    return _fetch_from_hub(asked, variant, local_files_only)


def count_weights(checkpoint):
    """Returns the number of weights in a checkpoint, read from the files' headers alone."""
    count = 0
    for file in checkpoint.weight_files:
        with safe_open(file, framework="pt") as opened:
            shapes = [part.get_shape() for part in map(opened.get_slice, opened.keys())]
        count += sum(math.prod(shape) for shape in shapes)
    return count


def _find_mini():
    from sdkit.mini import MODEL_FOLDER

    if not (MODEL_FOLDER / "model_index.json").is_file():
        raise ValidationError(
            "mini: the bundled model is not in this installation. Build it with "
            "`python -m sdkit.mini.build`, or name another model."
        )
    return MODEL_FOLDER


def _fetch_from_hub(asked, variant, local_files_only):
    name = RENAMED.get(asked, asked)
    moved = name != asked
    notices = (f"{asked} is gone from the Hub; this is its copy, {name}",) if moved else ()
    try:
        folder = DiffusionPipeline.download(
            name, variant=variant, use_safetensors=True, local_files_only=local_files_only
        )
    except Exception as error:  # the Hub's client, its transport and diffusers have their own each
        if "safetensors" in str(error):
            raise ValidationError(f"{name}: no safetensors on the Hub. {HOW_TO_CONVERT}") from error
        failure = describe_hub_failure(error, local_files_only)
        raise ValidationError(
            f"{asked}{f' (now {name})' if moved else ''}: not in the local cache, and {failure}. "
            "Go online once to fetch it, check the name, or name a folder."
        ) from error
    checkpoint = _look_at_folder(Path(folder), name, variant)
    revision = Path(folder).name[:12]  # the cache names a snapshot by its commit
    return replace(checkpoint, asked=asked, resolved=f"{name}@{revision}", notices=notices)


def _look_at_file(path, asked, variant, config, local_files_only):
    if path.suffix in PICKLED:
        raise ValidationError(f"{asked}: pickled weights. {HOW_TO_CONVERT}")
    if path.suffix != ".safetensors":
        raise ValidationError(f"{asked}: expected a .safetensors file or a pipeline folder.")
    if variant:
        raise ValidationError(f"{asked}: variant={variant!r} has no meaning for a single file.")
    _check_safetensors(path, asked)
    folder = find_config_folder(path, config, local_files_only)
    class_name, parts = _read_model_index(folder, f"config {config or folder.name}")
    components = [n for n, p in parts.items() if _is_model(*p) and n != "safety_checker"]
    return Checkpoint(asked, path.name, path, folder, class_name, tuple(components), (path,))


def _look_at_folder(folder, asked, variant):
    class_name, parts = _read_model_index(folder, asked)
    groups = {}
    for name, (library, part_class) in parts.items():
        if not (folder / name).is_dir():
            raise ValidationError(
                f"{asked}: the folder {name}/ is missing, model_index.json lists it as "
                f"{part_class}. Copy or download the model again."
            )
        if _is_model(library, part_class):
            groups[name] = _group_by_variant(folder / name)
            _check_has_safetensors(folder / name, groups[name], f"{asked}: {name}", variant)
    if not groups:
        raise ValidationError(f"{asked}: model_index.json lists no model.")
    if variant and not any(variant in group for group in groups.values()):
        there = sorted({other for group in groups.values() for other in group if other})
        raise ValidationError(
            f"{asked}: variant={variant!r} is not there, found {', '.join(there) or 'no variant'}. "
            "Leave `variant` out to load the plain files."
        )
    files = [file for group in groups.values() for file in group.get(variant) or group[None]]
    for file in files:
        _check_safetensors(file, f"{asked}: {file.relative_to(folder).as_posix()}")
    return Checkpoint(asked, asked, folder, folder, class_name, tuple(groups), tuple(files))


def _read_model_index(folder, asked):
    """Returns the pipeline class, and {component: (library, class)} without null parts."""
    path = folder / "model_index.json"
    if not path.is_file():
        raise ValidationError(f"{asked}: {_describe_folder(folder)}")
    try:
        index = json.loads(path.read_text(encoding="utf-8"))
        class_name = index["_class_name"]
        parts = {name: tuple(value) for name, value in index.items() if isinstance(value, list)}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValidationError(
            f"{asked}: model_index.json is not one of diffusers' ({_first_line(error)})."
        ) from error
    if not (isinstance(class_name, str) and hasattr(diffusers, class_name)):
        raise ValidationError(
            f"{asked}: pipeline class {class_name} is not in diffusers {diffusers.__version__}. "
            "Expected one of diffusers' own; a newer diffusers may have it."
        )
    parts.pop("_class_name", None)
    parts = {name: part for name, part in parts.items() if len(part) == 2 and part[1] is not None}
    return class_name, parts


def _describe_folder(folder):
    """Says what a folder without a model_index.json is instead."""
    expected = "expected a pipeline folder with a model_index.json."
    config = folder / "config.json"
    if config.is_file():
        return f"one component, not a pipeline; {expected} Name the folder above it."
    if any(folder.glob("*lora*.safetensors")) or (folder / "adapter_config.json").is_file():
        return f"LoRA weights, not a pipeline; {expected} Load the base model it was made for."
    files = sorted(file.name for file in folder.glob("*.safetensors"))
    if files:
        return f"not a pipeline folder; {expected} To load a single file name it: {files[0]}."
    if any(file.suffix in PICKLED for file in folder.iterdir()):
        return f"pickled weights, no pipeline; {expected} {HOW_TO_CONVERT}"
    return f"not a pipeline folder; {expected}"


def _is_model(library, class_name):
    """Whether a component has weights: its class is a torch module."""
    for module in (library, f"diffusers.pipelines.{library}"):
        try:
            found = getattr(importlib.import_module(module), class_name, None)
        except ImportError:
            continue
        return isinstance(found, type) and issubclass(found, torch.nn.Module)
    return False


def _group_by_variant(part):
    """Returns {variant or None: safetensors files}.

    Names are `stem.safetensors`, `stem.fp16.safetensors` and, in shards,
    `stem-00001-of-00002.safetensors` or `stem.fp16-00001-of-00002.safetensors`.
    """
    groups = {}
    for file in sorted(part.glob("*.safetensors")):
        _, _, variant = file.name.removesuffix(".safetensors").partition(".")
        groups.setdefault(variant.partition("-")[0] or None, []).append(file)
    return groups


def _check_has_safetensors(part, present, where, variant):
    if None in present or variant in present:
        return
    if present:
        found = sorted(present)
        raise ValidationError(
            f"{where}: only variant {', '.join(found)} is there. Load with variant={found[0]!r}."
        )
    if any(file.suffix in PICKLED for file in part.iterdir()):
        raise ValidationError(f"{where}: pickled weights, no safetensors. {HOW_TO_CONVERT}")
    raise ValidationError(f"{where}: no weights. Copy or download the model again.")


def _check_safetensors(path, where):
    try:
        with safe_open(path, framework="pt") as opened:
            empty = not opened.keys()
    except (SafetensorError, OSError) as error:
        raise ValidationError(
            f"{where}: corrupt or cut off ({_first_line(error)}). Copy or download it again."
        ) from error
    if empty:
        raise ValidationError(f"{where}: holds no weights.")


def _first_line(error):
    return (str(error).strip() or type(error).__name__).splitlines()[0]

"""The incident bundle: what is needed to find out, here or elsewhere, why an image was invalid.

    incident_000/
        incident.json      the run, the image, the finding, scheduler, environment, emulation
        call.safetensors   what the call that broke was given: the last finite latents among it

Nothing personal is in it but the prompt: no path, no user, no image.
"""

import json
import re
import shutil
from dataclasses import dataclass
from pathlib import Path

import diffusers
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from sdkit.emulate.mode import find_settings, suspended
from sdkit.finding import ComponentCall
from sdkit.generation.record import NOT_IN_JSON, is_finding, plain
from sdkit.validation import ValidationError

INCIDENT_VERSION = 1
INCIDENT_FOLDER = "incident_{:03}"
INCIDENT_NAME, CALL_NAME = "incident.json", "call.safetensors"
# What a bundle may call: it may come from anybody.
CALLED = re.compile(r"text_encoder(_\d)?|unet|transformer|vae\.(encode|decode)")
TENSOR, TUPLE = "__tensor__", "__tuple__"


@dataclass(frozen=True)
class Incident:
    """One invalid image, as it can be read back.

    Attributes:
        run: What the run's record says: settings, model, pipeline, device, dtypes, environment.
        image: What the image's record says: prompt, seed, problem, finding.
        scheduler: Class name and configuration.
        emulation: As `find_settings` gives it, or None.
        call: The component call that broke, on the CPU; None if every component was finite.
        lost: Arguments of the pipeline call that could not be kept, such as a callback.
    """

    run: dict
    image: dict
    scheduler: dict
    emulation: dict | None
    call: ComponentCall | None
    lost: tuple[str, ...] = ()


def save_incident(folder, *, run, image, pipe, call, call_kwargs=None) -> Path:
    """Writes an incident bundle, whole or not at all, over one of that name.

    Args:
        folder: Where it goes.
        run: The RunRecord so far.
        image: The ImageRecord of the invalid image.
        pipe: The pipeline, for its scheduler.
        call: The ComponentCall that broke, or None.
        call_kwargs: Arguments of the pipeline call; those that JSON cannot hold are named as lost.

    Returns:
        The folder.

    Raises:
        OSError: It cannot be written; nothing of it is left.
    """
    folder = Path(folder)
    partial = folder.with_name(f".{folder.name}.part")
    shutil.rmtree(partial, ignore_errors=True)
    tensors: dict[str, torch.Tensor] = {}
    left_out = ("images", *NOT_IN_JSON)
    kept_run = {name: value for name, value in vars(run).items() if name not in left_out}
    kept_image = {name: value for name, value in vars(image).items() if name != "pil_image"}
    content = {
        "version": INCIDENT_VERSION,
        "run": plain(kept_run),
        "image": plain(kept_image),
        "scheduler": {
            "class": type(pipe.scheduler).__name__,
            "config": plain(dict(pipe.scheduler.config)),
        },
        "emulation": find_settings(),
        "lost": find_lost(call_kwargs),
        "call": call
        and {
            "component": call.component,
            "args": pack(call.args, tensors, "args"),
            "kwargs": pack(call.kwargs, tensors, "kwargs"),
        },
    }
    try:
        partial.mkdir(parents=True)
        (partial / INCIDENT_NAME).write_text(json.dumps(content, indent=2) + "\n")
        with suspended():
            save_file(tensors, partial / CALL_NAME)
        shutil.rmtree(folder, ignore_errors=True)
        partial.rename(folder)
    except SafetensorError as error:  # how safetensors says that the disk is full
        raise OSError(str(error)) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return folder


def load_incident(folder) -> Incident:
    """Reads an incident bundle.

    Raises:
        ValidationError: It is none, or it is damaged; the message says what is wrong with it.
    """
    folder = Path(folder)
    if not (folder / INCIDENT_NAME).is_file():
        raise ValidationError(
            f"{folder}: has no {INCIDENT_NAME}. Expected a folder that generate wrote beside its "
            "images, such as incident_000."
        )
    try:
        content = json.loads((folder / INCIDENT_NAME).read_text())
        tensors = load_file(folder / CALL_NAME)
        call = content["call"]
        if content["version"] != INCIDENT_VERSION:
            raise ValidationError(
                f"{folder}: version {content['version']}, expected {INCIDENT_VERSION}. "
                "Read it with the sdkit that wrote it."
            )
        check_content(content, folder)
        return Incident(
            lost=tuple(content["lost"]),
            run=content["run"],
            image=content["image"],
            scheduler=content["scheduler"],
            emulation=content["emulation"],
            call=call
            and ComponentCall(
                call["component"], unpack(call["args"], tensors), unpack(call["kwargs"], tensors)
            ),
        )
    except (json.JSONDecodeError, UnicodeDecodeError, SafetensorError, OSError) as error:
        reason = " ".join(str(error).split())
        raise ValidationError(
            f"{folder}: damaged ({reason}). Run it again to get another."
        ) from error
    except (KeyError, TypeError, AttributeError) as error:
        raise ValidationError(
            f"{folder}: incomplete ({type(error).__name__}: {error}). Run it again to get another."
        ) from error


def check_content(content, folder):
    """Raises for a bundle whose parts are not what they must be: it may come from anybody."""
    kinds = {"run": dict, "image": dict, "scheduler": dict, "lost": list}
    run_kinds = {
        "settings": dict, "dtypes": dict, "attention": list, "environment": dict, "model": str,
    }  # fmt: skip
    wrong = [name for name, kind in kinds.items() if not isinstance(content[name], kind)]
    wrong += [
        f"run.{n}" for n, kind in run_kinds.items() if not isinstance(content["run"][n], kind)
    ]
    if not all(isinstance(name, str) for name in content["run"]["attention"]):
        wrong.append("run.attention")
    if not isinstance(content["image"]["prompt"], str) or "seed" not in content["image"]:
        wrong.append("image")
    if not isinstance(content["scheduler"]["config"], dict):
        wrong.append("scheduler.config")
    emulation, call = content["emulation"], content["call"]
    if emulation is not None and (not isinstance(emulation, dict) or len(emulation) not in (0, 3)):
        wrong.append("emulation")
    if call is not None and not CALLED.fullmatch(str(call["component"])):
        wrong.append("call.component")
    finding = content["image"]["finding"]
    if not is_finding(finding) and not (finding is None and call is None):
        wrong.append("image.finding")
    if wrong:
        raise ValidationError(f"{folder}: incomplete ({', '.join(wrong)}). Run it again.")


def find_lost(call_kwargs) -> list[str]:
    """Names of arguments that JSON cannot hold as they are."""

    def is_kept(value):
        if isinstance(value, (list, tuple)):
            return all(map(is_kept, value))
        if isinstance(value, dict):
            return all(map(is_kept, value.values()))
        return value is None or isinstance(value, (bool, int, float, str))

    return [name for name, value in (call_kwargs or {}).items() if not is_kept(value)]


def make_scheduler(incident: Incident):
    """The scheduler of the run, of diffusers' class by that name.

    Raises:
        ValidationError: diffusers knows no such scheduler.
    """
    name = incident.scheduler.get("class")
    scheduler = getattr(diffusers, str(name), None)
    if not (isinstance(scheduler, type) and issubclass(scheduler, diffusers.SchedulerMixin)):
        raise ValidationError(
            f"scheduler: diffusers {diffusers.__version__} has no {name!r}. Install the version of "
            f"the incident ({incident.run.get('environment', {}).get('diffusers')})."
        )
    try:
        return scheduler.from_config(incident.scheduler["config"])
    except Exception as error:  # a configuration of any origin
        raise ValidationError(
            f"scheduler: no {name} can be made of its configuration ({error}). The bundle is "
            "damaged: run it again to get another."
        ) from error


def pack(value, tensors: dict, name: str):
    """JSON types for a call's arguments; tensors go into `tensors` and leave their names."""
    if isinstance(value, torch.Tensor):
        with suspended():
            tensors[name] = value.detach().cpu().contiguous().clone()
        return {TENSOR: name}
    if isinstance(value, tuple):
        return {TUPLE: [pack(item, tensors, f"{name}.{i}") for i, item in enumerate(value)]}
    if isinstance(value, list):
        return [pack(item, tensors, f"{name}.{i}") for i, item in enumerate(value)]
    if isinstance(value, dict):
        return {key: pack(item, tensors, f"{name}.{key}") for key, item in value.items()}
    return plain(value)


def unpack(value, tensors: dict):
    """What `pack` was given."""
    if isinstance(value, dict):
        if TENSOR in value:
            return tensors[value[TENSOR]]
        if TUPLE in value:
            return tuple(unpack(item, tensors) for item in value[TUPLE])
        return {key: unpack(item, tensors) for key, item in value.items()}
    return [unpack(item, tensors) for item in value] if isinstance(value, list) else value

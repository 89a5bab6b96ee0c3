"""From an incident bundle to a diagnosis, on the machine that wrote it or on another one."""

from contextlib import ExitStack
from dataclasses import replace

import torch

from sdkit.attention import allow_unsafe_attention
from sdkit.device import describe_environment
from sdkit.diagnosis.bad_call import examine_finding
from sdkit.diagnosis.cause import Cause
from sdkit.diagnosis.diagnosis import Diagnosis
from sdkit.diagnosis.examination import diagnose
from sdkit.diagnosis.guarded_run import Run, run_guarded
from sdkit.diagnosis.place import describe
from sdkit.diagnosis.remedy import prove_remedy
from sdkit.emulate import active as find_emulation
from sdkit.emulate.again import emulate_again
from sdkit.finding import ComponentCall, Finding
from sdkit.generation.incident import load_incident, make_scheduler
from sdkit.guarding import unguarded
from sdkit.loading import load_pipeline
from sdkit.validation import ValidationError

ATTENTION_OF = {  # what load_pipeline calls what a record names
    "SlicedAttnProcessor": "diffusers-sliced",
    "SlicedAttnAddedKVProcessor": "diffusers-sliced",
    "SafeSlicedAttnProcessor": "sliced",
}


def diagnose_incident(folder, *, model=None, backend="auto", prove=False) -> Diagnosis:
    """Makes the call of an incident again and diagnoses it.

    Args:
        folder: The bundle.
        model: What to load, where the record's own name is not to be found on this machine.
        backend: As in `load_pipeline`. An emulated incident is emulated again.
        prove: Whether to run the whole image again with the remedy.

    Returns:
        A Diagnosis; its evidence says whether the fault came back here.

    Raises:
        ValidationError: The bundle is damaged, or its model, scheduler or emulation is not to be
            had here.
    """
    incident = load_incident(folder)
    pipe = load_pipe(incident, model, backend)
    with ExitStack() as stack:
        try:
            stack.enter_context(emulate_again(incident.emulation))
        except (ValueError, KeyError, TypeError, RuntimeError) as error:
            raise ValidationError(f"{folder}: emulation: {error}.") from error
        stack.enter_context(unguarded(pipe))
        try:
            return examine_incident(pipe, incident, prove)
        except (KeyError, TypeError, AttributeError, RuntimeError) as error:
            raise ValidationError(
                f"{folder}: does not fit {model or incident.run['model']} "
                f"({type(error).__name__}: {error}). Name the model that made it with model=."
            ) from error


def load_pipe(incident, model, backend):
    """The pipeline of the run, before any emulation begins."""
    run = incident.run
    with allow_unsafe_attention():  # what it does is the question
        pipe, _ = load_pipeline(
            model or run["model"],
            backend="cpu" if incident.emulation is not None else backend,
            dtype=dict(run["dtypes"]),
            attention=next(filter(None, map(ATTENTION_OF.get, run["attention"])), "sdpa"),
            progress=False,
        )
    pipe.scheduler = make_scheduler(incident)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def examine_incident(pipe, incident, prove) -> Diagnosis:
    """Makes the call of an incident again, and finds the cause."""
    run, image = incident.run, incident.image
    pipe_kwargs = list_pipe_kwargs(run["settings"], image, incident.lost)
    is_whole = not run["settings"].get("image_to_image")
    if incident.call is None and not is_whole:
        raise ValidationError(
            "incident: an image-to-image run without a bad call cannot be made again, for the "
            "bundle does not hold its input image. Run the pipeline with that image under diagnose."
        )

    def call(without=()):
        return run_guarded(pipe, [image["prompt"]], image["seed"], pipe_kwargs)

    if incident.call is None:
        return diagnose(pipe, image["prompt"], seed=image["seed"], prove=prove, **pipe_kwargs)
    finding = read_finding(image["finding"])
    again = Run(finding=finding, call=move(incident.call, pipe._execution_device))
    found = examine_finding(pipe, again, call)
    if found.bad_op is None and found.cause == "backend-fault":
        diagnosis = tell_gone(found, finding, incident)
    else:
        diagnosis = tell_replay(found, finding, incident)
        if prove and is_whole:
            diagnosis = prove_remedy(pipe, diagnosis, call)
        elif prove:
            diagnosis = replace(diagnosis, proof="the bundle does not hold the input image")
    return replace(
        diagnosis,
        environment=describe_environment(str(pipe._execution_device)),
        emulated=find_emulation(),
    )


def tell_gone(found: Diagnosis, finding: Finding, incident) -> Diagnosis:
    """A fault that did not come back here says nothing of the machine that recorded it."""
    evidence = {**found.evidence, "recorded_on": tell_origin(finding, incident)}
    cause = Cause(
        "undecided",
        {**evidence, "came_back_here": False},
        "The same call on the same numbers is finite here: run `sdkit diagnose --incident` on the "
        "machine that recorded it, where its backend is the suspect.",
    )
    return describe(finding.stage, finding.step, found.module, None, cause)


def tell_origin(finding: Finding, incident) -> str:
    """Device and torch of the machine that recorded an incident."""
    return f"{finding.device}, torch {incident.run['environment'].get('torch')}"


def tell_replay(found: Diagnosis, finding: Finding, incident) -> Diagnosis:
    """A diagnosis with where its incident was recorded, and what its bundle lacks."""
    came_back = found.bad_op is not None if finding.tensor == "output" else "not replayed"
    evidence = {
        **found.evidence,
        "recorded_on": tell_origin(finding, incident),
        "came_back_here": came_back,
    }
    if incident.lost:
        evidence["not_in_the_bundle"] = list(incident.lost)
    return replace(found, evidence=evidence)


def read_finding(recorded: dict) -> Finding:
    """The guard's finding as it was."""
    known = {name: recorded[name] for name in Finding.__dataclass_fields__}
    return Finding(**{**known, "rows": tuple(recorded["rows"])})


def list_pipe_kwargs(settings: dict, image: dict, lost) -> dict:
    """The pipeline's arguments for one image of a recorded run, without those that were lost."""
    ours = ("batch_size", "on_nonfinite", "image_to_image", "strength", *lost)
    pipe_kwargs = {name: value for name, value in settings.items() if name not in ours}
    if image.get("negative_prompt"):
        pipe_kwargs["negative_prompt"] = image["negative_prompt"]
    return pipe_kwargs


def move(call: ComponentCall, device) -> ComponentCall:
    """The call with its tensors on a device."""

    def take(value):
        if isinstance(value, torch.Tensor):
            return value.to(device)
        if isinstance(value, dict):
            return {key: take(item) for key, item in value.items()}
        if isinstance(value, (list, tuple)):
            return type(value)(map(take, value))
        return value

    return replace(call, args=take(call.args), kwargs=take(call.kwargs))

"""Proof: the run again with the remedy, smallest change first; it must come out valid.

Everything is undone afterwards: the very tensors, processors, inputs and methods come back. What
cannot be healed here (a bad weight that is bad on disk too, a formula without an answer) is proved
by a counterfactual: the same run with the bad values set to zero shows that nothing else is broken.
"""

from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from diffusers import ModelMixin

from sdkit.diagnosis.changes import (
    ZeroedMemory,
    ZeroMaskedRows,
    mended,
    reloaded,
    replaced,
    with_own_attention,
    with_sdpa,
    without_hooks,
    zeroed_weights,
)
from sdkit.diagnosis.diagnosis import Diagnosis
from sdkit.diagnosis.source_line import name_hooks
from sdkit.guarding import find_components
from sdkit.loading.border_casts import bordered
from sdkit.loading.lifting import computing, holds_low, in_float32
from sdkit.loading.modules import find_module

# Which arguments of a pipeline bring what the guard calls by these names.
INPUTS = {
    "latents": ("latents",),
    "prompt_embeds": (
        "prompt_embeds",
        "negative_prompt_embeds",
        "pooled_prompt_embeds",
        "negative_pooled_prompt_embeds",
    ),
}
CALLBACKS = ("callback_on_step_end", "callback")


@dataclass(frozen=True)
class Trial:
    """One remedy that can be tried here.

    Attributes:
        what: What is changed, as in "unet in float32".
        applied: A function that returns a context manager under which it is changed.
        remedy: The sentence for the user if this trial proves it; "" keeps the diagnosis's own.
        without: Arguments of the pipeline call that are left out.
    """

    what: str
    applied: object
    remedy: str = ""
    without: tuple[str, ...] = ()


def prove_remedy(pipe, diagnosis: Diagnosis, call) -> Diagnosis:
    """Runs `call` under one remedy after the other until its images are valid.

    Args:
        pipe: The pipeline.
        diagnosis: What was found.
        call: Runs the pipeline again: `call(without=names)` returns a `Run`.

    Returns:
        The diagnosis with `proven` and `proof`, and the remedy that proved to do.
    """
    tried = []
    is_hidden = "swallowed_by" in diagnosis.evidence  # then the images may be valid uncured
    if "finite_replays" in diagnosis.evidence and call().is_valid:
        proof = "an unchanged run is valid too, so no remedy can be proved on it"
        return replace(diagnosis, proof=proof)
    for trial in list_trials(pipe, diagnosis):
        try:
            with trial.applied(), bordered(pipe):
                run = call(without=trial.without)
        except Exception as error:  # a trial that cannot run must not lose the diagnosis
            tried.append(f"{trial.what} could not be run ({type(error).__name__}: {error})")
            continue
        if run.is_valid and not (is_hidden and run.has_hidden):
            proof = f"{trial.what}: {len(run.images)} of {len(run.images)} images valid"
            remedy = trial.remedy or diagnosis.remedy
            return replace(diagnosis, proven=True, remedy=remedy, proof=proof)
        tried.append(f"{trial.what}: still bad")
    if tried:
        return replace(diagnosis, proven=False, proof="; ".join(tried))
    return replace(diagnosis, proof="no remedy for this cause can be run here")


def list_trials(pipe, diagnosis: Diagnosis) -> list[Trial]:
    """The remedies for a cause, smallest first."""
    cause = diagnosis.evidence.get("made_by", diagnosis.cause)
    if cause == "uninitialised-memory":
        return [*try_sdpa(pipe, diagnosis), try_zeroed_memory()]
    if cause in ("range-overflow", "underflow"):
        return [*try_without_autocast(), *try_float32(pipe, diagnosis)]
    if cause == "backend-fault":
        sdpa = try_sdpa(pipe, diagnosis)
        return [*sdpa, *try_float32(pipe, diagnosis), *try_cpu(pipe, diagnosis)]
    if cause == "bad-weights":
        names = diagnosis.evidence["weights"]
        what = f"counterfactual, the bad values of {', '.join(names)} set to 0"
        counterfactual = Trial(what, partial(zeroed_weights, pipe, names))
        return [*try_without_autocast(), *try_reloaded(pipe, names[0]), counterfactual]
    if cause == "bad-input":
        return [
            *try_without_callbacks(diagnosis),
            *try_without_hooks(pipe, diagnosis),
            *try_own_inputs(pipe, diagnosis),
        ]
    if cause == "invalid-arithmetic":
        return [
            *try_without_callbacks(diagnosis),
            *try_own_attention(pipe, diagnosis),
            *try_without_hooks(pipe, diagnosis),
            *try_mended(pipe, diagnosis),
        ]
    if cause == "masked-softmax":
        nothing = Trial("fully masked rows attending to nothing", ZeroMaskedRows)
        return [nothing, *try_own_attention(pipe, diagnosis)]
    if cause == "safety-checker":
        return [Trial("no safety checker", partial(replaced, pipe, "safety_checker", None))]
    return []


def try_sdpa(pipe, diagnosis) -> list[Trial]:
    """SDPA in place of an attention that goes through baddbmm."""
    if "baddbmm" not in (diagnosis.op or "") or not diagnosis.module:
        return []
    root = diagnosis.module.partition(".")[0]
    denoiser = getattr(pipe, root)
    if not hasattr(denoiser, "set_attn_processor"):
        return []
    return [Trial(f"{root} with SDPA", partial(with_sdpa, denoiser))]


def try_zeroed_memory() -> Trial:
    """All fresh memory zeroed: no cure in itself, but the proof that memory is the cause."""
    return Trial("all fresh memory zeroed", ZeroedMemory)


def try_float32(pipe, diagnosis) -> list[Trial]:
    """The module alone, its component, everything."""
    path = diagnosis.module or ""
    root = path.partition(".")[0]
    low = [n for n, c in find_components(pipe).items() if holds_low(c)]
    trials = []
    if root in low and "." in path:
        module = find_module(pipe, path)
        trials.append(
            Trial(
                f"{path} in float32",
                partial(computing, [module]),
                f"Run {path} alone in float32; all else may stay as it is.",
            )
        )
    if root in low:
        remedy = f'Load {root} in float32: `load_pipeline(dtype={{"{root}": "float32"}})`.'
        trials.append(Trial(f"{root} in float32", partial(in_float32, pipe, [root]), remedy))
    if len(low) > 1:
        remedy = 'Load everything in float32: `load_pipeline(dtype="float32")`.'
        trials.append(Trial("everything in float32", partial(in_float32, pipe), remedy))
    return trials


def try_without_autocast() -> list[Trial]:
    """Every op in the dtype of its weights, where the run is under `torch.autocast`."""
    kinds = [kind for kind in ("cpu", "cuda", "mps") if torch.is_autocast_enabled(kind)]
    remedy = "Run it without torch.autocast, which casts to a dtype that is too narrow."
    applied = [partial(torch.autocast, kind, enabled=False) for kind in kinds]
    return [Trial("without autocast", without_autocast, remedy) for without_autocast in applied]


def try_reloaded(pipe, name) -> list[Trial]:
    """The component of a weight as its checkpoint has it, in float32, where that is on disk."""
    root = name.partition(".")[0]
    component = getattr(pipe, root)
    folder = getattr(component, "name_or_path", None)  # transformers' name for it
    if isinstance(component, ModelMixin):
        folder = component.config.get("_name_or_path")
    if not folder or not Path(folder).is_dir() or getattr(component, "peft_config", None):
        return []
    remedy = f'Load {root} in float32: `load_pipeline(dtype={{"{root}": "float32"}})`.'
    what = f"{root} loaded anew in float32"
    return [Trial(what, partial(reloaded, pipe, root, Path(folder)), remedy)]


def try_cpu(pipe, diagnosis) -> list[Trial]:
    """The module, then its component, on the CPU in float32, outside every emulation."""
    path = diagnosis.module
    if path is None:
        return []
    component = find_module(pipe, path.partition(".")[0])
    parts = list(component.children()) if hasattr(component, "decode") else [component]
    places = {path: [find_module(pipe, path)]} if "." in path else {}
    places[path.partition(".")[0]] = parts
    return [
        Trial(
            f"{place} on the CPU in float32",
            partial(computing, modules, on_cpu=True),
            f"The kernel is wrong on this backend: upgrade torch; until then run {place} on the "
            "CPU, and report the reproduction.",
        )
        for place, modules in places.items()
    ]


def try_own_inputs(pipe, diagnosis) -> list[Trial]:
    """The pipeline's own inputs in place of the caller's, or a scheduler made anew."""
    names = INPUTS.get(diagnosis.evidence.get("what_it_is"), ())
    trials = [Trial("the pipeline's own inputs", nullcontext, without=names)] if names else []
    if any(name.startswith("scheduler.") for name in diagnosis.evidence):
        anew = type(pipe.scheduler).from_config(pipe.scheduler.config)
        what, own = "the scheduler made anew, with its own sigmas", ("sigmas", "timesteps")
        trials.append(Trial(what, partial(replaced, pipe, "scheduler", anew), without=own))
    return trials


def try_without_callbacks(diagnosis) -> list[Trial]:
    """Without the caller's code between two steps, where no module is to blame."""
    source = diagnosis.bad_op and diagnosis.bad_op.source
    if diagnosis.module or not source or source.startswith(("pipeline_", "scheduling_")):
        return []
    return [Trial("no callback", nullcontext, without=CALLBACKS)]


def try_own_attention(pipe, diagnosis) -> list[Trial]:
    """The attention of diffusers in place of a processor that somebody else wrote."""
    path = diagnosis.module
    processor = path and getattr(find_module(pipe, path), "processor", None)
    model = path and getattr(pipe, path.partition(".")[0])
    if processor is None or not hasattr(model, "attn_processors"):
        return []
    name = type(processor).__name__
    remedy = f"Mend {name}, or give these layers AttnProcessor2_0() in its place."
    trial = partial(with_own_attention, model, type(processor))
    return [Trial(f"{name} replaced by SDPA", trial, remedy)]


def try_without_hooks(pipe, diagnosis) -> list[Trial]:
    """Without what others hooked to the module that broke."""
    path = diagnosis.module
    hooks = name_hooks(find_module(pipe, path)) if path else ()
    if not hooks:
        return []
    trial = partial(without_hooks, find_module(pipe, path))
    remedy = f"Mend or remove what is hooked to {path}: {', '.join(hooks)}."
    return [Trial(f"{path} without its hooks", trial, remedy)]


def try_mended(pipe, diagnosis) -> list[Trial]:
    """No cure, but it shows whether anything else is broken."""
    path = diagnosis.module
    if not path:
        return []
    what = f"counterfactual, the NaN and Inf that {path} puts out set to 0"
    return [Trial(what, partial(mended, find_module(pipe, path)))]

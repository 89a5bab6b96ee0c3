"""Proof: the run again with the remedy, smallest change first; it must come out valid.

Everything is undone afterwards: the very tensors, processors, inputs and methods come back. A bad
weight cannot be healed here, so its proof is a counterfactual: the same run with the bad values set
to zero, which shows that nothing else is broken.
"""

from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial

import torch
from diffusers.models.attention_processor import AttnProcessor2_0
from torch.utils._python_dispatch import TorchDispatchMode

from sdkit.diagnosis.diagnosis import Diagnosis
from sdkit.diagnosis.experiments import SOFTMAX_OPS
from sdkit.emulate.memory import is_allocating
from sdkit.emulate.mode import is_composite, suspended
from sdkit.finding import find_tensors
from sdkit.guarding import find_components
from sdkit.loading.border_casts import bordered
from sdkit.loading.lifting import computing, holds_low, in_float32, restored
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
        if run.is_valid:
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
        return try_float32(pipe, diagnosis)
    if cause == "backend-fault":
        sdpa = try_sdpa(pipe, diagnosis)
        return [*sdpa, *try_float32(pipe, diagnosis), *try_cpu(pipe, diagnosis)]
    if cause == "bad-weights":
        names = diagnosis.evidence["weights"]
        what = f"counterfactual, the bad values of {', '.join(names)} set to 0"
        return [Trial(what, partial(zeroed_weights, pipe, names))]
    if cause == "bad-input":
        return [*try_without_hooks(pipe, diagnosis), *try_own_inputs(pipe, diagnosis)]
    if cause == "masked-softmax":
        return [Trial("fully masked rows attending to nothing", ZeroMaskedRows)]
    if cause == "safety-checker":
        return [Trial("no safety checker", partial(replaced, pipe, "safety_checker", None))]
    return []


def try_sdpa(pipe, diagnosis) -> list[Trial]:
    """SDPA in place of an attention that goes through baddbmm."""
    if "baddbmm" not in (diagnosis.op or ""):
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
        what = "the scheduler made anew"
        trials.append(Trial(what, partial(replaced, pipe, "scheduler", anew)))
    return trials


def try_without_hooks(pipe, diagnosis) -> list[Trial]:
    """Without what others hooked to the module in which memory changed."""
    hooks = diagnosis.evidence.get("hooks", ())
    if not hooks:
        return []
    what = f"{diagnosis.module} without its hooks"
    return [Trial(what, partial(without_hooks, find_module(pipe, diagnosis.module)))]


@contextmanager
def without_hooks(module):
    """A module without its forward hooks; those that come meanwhile go by themselves."""
    kept = [(hooks, dict(hooks)) for hooks in (module._forward_pre_hooks, module._forward_hooks)]
    for hooks, _ in kept:
        hooks.clear()
    try:
        yield
    finally:
        for hooks, before in kept:
            hooks.update(before)


@contextmanager
def with_sdpa(denoiser):
    """All attention of a UNet or transformer through scaled_dot_product_attention."""
    before = dict(denoiser.attn_processors)
    denoiser.set_attn_processor(AttnProcessor2_0())
    try:
        yield
    finally:
        denoiser.set_attn_processor(before)


@contextmanager
def zeroed_weights(pipe, names):
    """Sets the NaN and Inf of weights to zero."""
    places = [name.rpartition(".") for name in names]
    tensors = [getattr(find_module(pipe, path), leaf) for path, _, leaf in places]
    with restored(tensors), torch.no_grad():
        for tensor in tensors:
            tensor.data = torch.where(tensor.data.isfinite(), tensor.data, 0)
        yield


@contextmanager
def replaced(pipe, name, value):
    """Another component in place of one."""
    before = getattr(pipe, name)
    setattr(pipe, name, value)
    try:
        yield
    finally:
        setattr(pipe, name, before)


class ZeroedMemory(TorchDispatchMode):
    """Fresh memory holds zeros, whatever the backend hands out."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if is_composite(func):  # under inference_mode these arrive whole
            with self:
                return func.decompose(*args, **(kwargs or {}))
        result = func(*args, **(kwargs or {}))
        if is_allocating(func):
            with suspended():
                for tensor in find_tensors(result):
                    tensor.zero_()
        return result


class ZeroMaskedRows(TorchDispatchMode):
    """Softmax of a row of -inf alone is zero: such a query attends to nothing."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if is_composite(func):  # under inference_mode these arrive whole
            with self:
                return func.decompose(*args, **(kwargs or {}))
        result = func(*args, **(kwargs or {}))
        if func._schema.name.partition("::")[2] not in SOFTMAX_OPS:
            return result
        with suspended():
            masked = (args[0] == float("-inf")).all(dim=args[1], keepdim=True)
            return result.masked_fill(masked, 0)

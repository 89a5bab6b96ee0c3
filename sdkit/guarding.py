"""Finite checks at the stage boundaries of any diffusers pipeline: the first bad value is named.

    with guard(pipe):
        pipe("black casual shoes")  # raises at the first NaN or Inf, before the scheduler uses it

One check follows each call of a text encoder, of the UNet (or transformer) and of the VAE. It looks
at what went in as well as at what came out, so a component that was fed NaN is not blamed for it.

What a step is, `steps.py` says.
"""

import weakref
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from dataclasses import replace
from functools import partial

import torch

from sdkit.finding import (
    ComponentCall,
    Finding,
    GuardReport,
    NonFiniteError,
    describe_bad,
    find_tensors,
)
from sdkit.hooks import after_forward, after_method
from sdkit.steps import StepCounter, name_denoiser_arguments
from sdkit.validation import ValidationError, is_finite

# What the UNet's and the transformers' parameters mean; every other one is "conditioning".
MEANING = {
    "sample": "latents",
    "hidden_states": "latents",
    "timestep": "scheduler",
    "encoder_hidden_states": "prompt_embeds",
    "pooled_projections": "prompt_embeds",
}

# What pipelines call a component, by its part: Kandinsky's VAE is a movq, LDM's a vqvae.
TEXT_ENCODERS = ("text_encoder", "bert")  # text_encoder_2 as well
DENOISERS = ("unet", "transformer")
VAES = ("vae", "movq", "vqvae")

# On a component that `install_guard` watches: how to undo that.
MARK = "_sdkit_guard"
_resting = ContextVar("components whose permanent guard rests", default=())

__all__ = [
    "Finding",
    "GuardReport",
    "NonFiniteError",
    "find_components",
    "find_denoisers",
    "guard",
    "install_guard",
    "remove_guard",
    "unguarded",
]


@contextmanager
def guard(pipe, *, on_nonfinite="raise"):
    """Watches a pipeline for NaN and Inf while the block runs; removes every trace of itself after.

    A permanent guard (`install_guard`) rests meanwhile: this one alone decides what happens.

    Args:
        pipe: Any diffusers pipeline with a `unet` or a `transformer`. LoRA layers and
            `torch.compile` are fine, and pipelines that share its components are watched too; a
            component that is swapped inside the block is not.
        on_nonfinite: "raise" stops at the first bad value; "record" lets the run go on and reports
            where NaN and Inf arise, not where they are merely passed on.

    Yields:
        A GuardReport that fills while the block runs.

    Raises:
        NonFiniteError: At the first bad value, before the scheduler has used it; at the end of the
            block for latents that no component was given any more (`output_type="latent"`).
        ValidationError: The pipeline has nothing to watch, or `on_nonfinite` is unknown.
    """
    if on_nonfinite not in ("raise", "record"):
        raise ValidationError(f'on_nonfinite: got {on_nonfinite!r}, expected "raise" or "record".')
    components, report = find_components(pipe), GuardReport()
    watch = _Watch(pipe, report, raises=on_nonfinite == "raise")
    with unguarded(pipe), _dtype_kept_on_error(components.get("vae")), ExitStack() as undo:
        for name, component in components.items():
            _watch_component(name, component, watch, undo)
        if getattr(pipe, "scheduler", None) is not None:
            after_method(pipe.scheduler, "step", watch.after_scheduler, undo)
        yield report
        watch.judge_unread()


@contextmanager
def _dtype_kept_on_error(vae):
    """Casts a VAE back that an error has left lifted.

    SDXL's pipelines lift a float16 VAE to float32 and cast it back after the call; whoever raises
    in between leaves it float32, and the next call crashes. The way there and back is exact.
    Guarded by test_an_error_leaves_no_lifted_vae in tests/test_guarding.py.
    """
    kept = {parameter: parameter.dtype for parameter in vae.parameters()} if vae is not None else {}
    try:
        yield
    except BaseException:
        for parameter, dtype in kept.items():
            parameter.data = parameter.data.to(dtype)
        raise


def install_guard(pipe):
    """Puts a permanent guard on a pipeline: every call raises at its first NaN or Inf.

    It belongs to the components: other pipelines made of the same ones (`from_pipe`) have it too.
    It rests inside `guard(pipe)`, so inside `generate` too, and inside `unguarded(pipe)`. Take it
    off before `torch.compile`, which would trace it. A second call changes nothing. What the last
    step makes of latents that are handed out raw (`output_type="latent"`) it does not see; `guard`
    does.

    Args:
        pipe: As for `guard`.

    Raises:
        ValidationError: The pipeline has nothing to watch.
    """
    remove_guard(pipe)
    watch = _Watch(pipe, GuardReport(), raises=True, rests=True)
    for name, component in find_components(pipe).items():
        undo = ExitStack()
        _watch_component(name, component, watch, undo)
        setattr(component, MARK, undo)


def remove_guard(pipe):
    """Takes the permanent guard of `install_guard` off again, if there is one."""
    for component in find_components(pipe).values():
        if hasattr(component, MARK):
            getattr(component, MARK).close()
            delattr(component, MARK)


@contextmanager
def unguarded(pipe):
    """Lets the permanent guard of a pipeline rest while the block runs, in this thread."""
    components = [getattr(c, "_orig_mod", c) for c in find_components(pipe).values()]
    token = _resting.set((*_resting.get(), *components))
    try:
        yield
    finally:
        _resting.reset(token)


def find_components(pipe):
    """Returns the pipeline's text encoders, UNet or transformer and VAE, by name.

    Raises:
        ValidationError: It is no diffusers pipeline, or has neither a UNet nor a transformer.
    """
    modules = {
        name: module
        for name, module in getattr(pipe, "__dict__", {}).items()
        if name.startswith((*TEXT_ENCODERS, *DENOISERS)) or name in VAES
        if isinstance(module, torch.nn.Module)
    }
    if not any(name.startswith(DENOISERS) for name in modules):
        raise ValidationError(
            f"{type(pipe).__name__}: found {', '.join(modules) or 'no component'} to watch, "
            "expected a diffusers pipeline with a unet or a transformer. Hand over the pipeline "
            "itself, as StableDiffusionPipeline.from_pretrained returns it."
        )
    return modules


def find_denoisers(pipe) -> list[torch.nn.Module]:
    """Returns the UNet or transformer, or both transformers of a pipeline that has two."""
    return [c for name, c in find_components(pipe).items() if name.startswith(DENOISERS)]


def _watch_component(name, component, watch, undo):
    """Has a watch look at each call of a component, until it is undone."""
    find_component = weakref.ref(component)  # a hook must not keep its own module alive

    def judging(look):
        if not watch.rests:
            return look
        return lambda *call: None if _is_resting(find_component()) else look(*call)

    if name in VAES:
        component = getattr(component, "_orig_mod", component)  # under torch.compile
        after_method(component, "encode", judging(partial(watch.after_encode, name)), undo)
        after_method(component, "decode", judging(partial(watch.after_decode, name)), undo)
    elif name.startswith(TEXT_ENCODERS):
        after_forward(component, judging(partial(watch.after_text_encoder, name)), undo)
    else:
        after_forward(component, judging(partial(watch.after_denoiser, name)), undo)


def _is_resting(component):
    return any(component is resting for resting in _resting.get())


class _Watch:
    """Follows the pipeline calls inside one guard and judges each call of a component."""

    def __init__(self, pipe, report, *, raises, rests=False):
        # Components hold a permanent watch: if it held their pipeline, gigabytes would wait for
        # the garbage collector. They may also outlive it, in another pipeline.
        self._find_pipe = weakref.ref(pipe)
        self.report, self.raises, self.rests = report, raises, rests
        self.steps = StepCounter(pipe)
        self.findings_before = 0  # of earlier runs
        self.unread = None  # (latents, step, timestep) of a scheduler's step, until they are given

    def after_scheduler(self, args, kwargs, output):
        self.unread = (next(find_tensors(output), None), self.steps.step, self.steps.timestep)

    def judge_unread(self):
        """Looks at the last latents of a run, where nothing that is watched was given them."""
        (latents, step, timestep), self.unread = self.unread or (None, None, None), None
        if latents is None or is_finite(latents) or len(self.report) > self.findings_before:
            return
        made = describe_bad(latents, "scheduler", step, timestep, "scheduler.step", "output")
        self._report(made, None)

    def after_text_encoder(self, name, args, kwargs, output):
        if self.steps.step is not None:  # it has denoised since: the next pipeline call begins
            self.judge_unread()
            self.steps.begin_run()
            self.findings_before = len(self.report)
        self._judge("text_encoder", ComponentCall(name, args, kwargs), {}, output)

    def after_encode(self, name, args, kwargs, output):
        call, inputs = ComponentCall(f"{name}.encode", args, kwargs), (args, kwargs)
        self._judge("vae", call, {"image": (("image", None, None), inputs)}, output)

    def after_decode(self, name, args, kwargs, output):
        call, inputs = ComponentCall(f"{name}.decode", args, kwargs), (args, kwargs)
        self.unread = None
        self._judge("vae", call, {"latents": (self._latents_origin(), inputs)}, output)

    def after_denoiser(self, name, args, kwargs, output):
        arguments = name_denoiser_arguments(args, kwargs)
        latents_origin, has_denoised = self._latents_origin(), self.steps.step is not None
        if self.steps.advance(arguments.get("timestep")):
            latents_origin = ("latents", None, None)
            if has_denoised:
                self.judge_unread()
                self.findings_before = len(self.report)
        self.unread = None
        now = (self.steps.step, self.steps.timestep)
        incoming = {}
        for argument, value in arguments.items():
            meaning = MEANING.get(argument, "conditioning")
            if "mask" not in argument:  # -inf is how a mask says no
                origin = latents_origin if meaning == "latents" else (meaning, *now)
                incoming[argument] = (origin, value)
        self._judge("unet", ComponentCall(name, args, kwargs), incoming, output, *now)

    def _latents_origin(self):
        """(stage, step, timestep) of what made the latents that a component is given now."""
        if self.steps.step is None:
            return ("latents", None, None)
        return ("scheduler", self.steps.step, self.steps.timestep)

    def _judge(self, stage, call, incoming, output, step=None, timestep=None):
        """Looks at one call: what it was fed, {argument: (origin, value)}, and what it made."""
        component = call.component
        self.report.calls[component] = self.report.calls.get(component, 0) + 1
        fed = [
            describe_bad(tensor, *origin, component, argument)
            for argument, (origin, value) in incoming.items()
            for tensor in find_tensors(value)
            if not is_finite(tensor)
        ]
        if fed and len(self.report) == self.findings_before:
            self._report(fed[0], call)
        bad_output = next((t for t in find_tensors(output) if not is_finite(t)), None)
        if bad_output is None:
            return
        made = describe_bad(bad_output, stage, step, timestep, component, "output")
        # A cast at the component's border may have changed the tensor's: what counts is its own.
        module = getattr(self._find_pipe(), component.partition(".")[0], None)
        dtype = getattr(module, "dtype", made.dtype)
        made = replace(made, dtype=str(dtype).removeprefix("torch."))
        if not fed or not made.follows_from(fed):
            self._report(made, call)

    def _report(self, finding, call):
        self.report.findings.append(finding)
        self.report.bad_call = self.report.bad_call or call
        if self.raises:
            raise NonFiniteError(finding.message, finding)

"""`diagnose`: one guarded run, one replay of the call that broke, experiments, one answer.

The guard's run is the pipeline as the user runs it. When it fires, the call that broke is made
again with the very inputs it had, under the op-level trace: first as it is, then with fresh memory
filled with NaN, for a fault that depends on memory may not come back by itself. When nothing fires
and the image is bad all the same, the run is repeated under the trace, to find a NaN that an op
swallowed, and in float32, to find what float16 lost.
"""

from dataclasses import dataclass, replace

import numpy as np
import torch

from sdkit.device import describe_environment
from sdkit.diagnosis.cause import Cause, find_cause
from sdkit.diagnosis.diagnosis import Diagnosis
from sdkit.diagnosis.module_watch import ModuleWatch
from sdkit.diagnosis.op_record import BadOp
from sdkit.diagnosis.remedy import prove_remedy
from sdkit.diagnosis.reproduction import shows_the_fault, write_reproduction
from sdkit.diagnosis.trace import find_first_bad_op
from sdkit.emulate import active as find_emulation
from sdkit.finding import ComponentCall, Finding, NonFiniteError
from sdkit.guarding import find_components, guard, unguarded
from sdkit.loading.lifting import LOW_DTYPES, in_float32
from sdkit.validation import ValidationError, judge_image

# Of an image in [0, 1]. Pictures of a night have a mean above this; the report's were 0.
DARK_MEAN = 0.06
MEMORIES = (None, "nan", None)  # what fresh memory holds in each replay until one breaks again


@dataclass
class Run:
    """One pipeline call under the guard.

    Attributes:
        images: Float images (N, H, W, 3), or None if the guard stopped it.
        is_censored: What the safety checker says of each image.
        finding: The guard's first, or None.
        call: The component call it is about.
        suspect: Path of the first module whose output was bad in that call.
    """

    images: np.ndarray | None = None
    is_censored: tuple[bool, ...] = ()
    finding: Finding | None = None
    call: ComponentCall | None = None
    suspect: str | None = None

    @property
    def is_valid(self) -> bool:
        """Whether it ended with images that are all valid."""
        return self.images is not None and all(judge_image(image).valid for image in self.images)


def diagnose(pipe, prompts, *, seed=0, prove=False, **pipe_kwargs) -> Diagnosis:
    """Runs a pipeline once and says what is wrong with its images, where, and why.

    The images are made in one batch, from the noise that `generate` draws for the same seeds.

    Args:
        pipe: A diffusers pipeline with a UNet or a transformer.
        prompts: One prompt or a list of them; None if `prompt_embeds` are given.
        seed: Image i is drawn from seed + i, on the CPU.
        prove: Run again with the remedy; it must come out valid.
        **pipe_kwargs: Handed on to the pipeline call (`num_inference_steps=10`, `latents=...`).

    Returns:
        A Diagnosis. Afterwards the pipeline is as it was: no hook, no mode, no changed weight.

    Raises:
        ValidationError: The pipeline or the arguments cannot work; nothing was run.
    """
    prompts = check_prompts(prompts, pipe_kwargs)
    check_pipeline(pipe)

    def call(without=()):
        kept = {name: value for name, value in pipe_kwargs.items() if name not in without}
        return run_guarded(pipe, prompts, seed, kept)

    with unguarded(pipe):  # a replay must reach the op, whatever guard the pipeline carries
        run = call()
        examine = examine_finding if run.finding else examine_images
        diagnosis = examine(pipe, run, call)
        if prove:
            diagnosis = prove_remedy(pipe, diagnosis, call)
    return replace(
        diagnosis,
        environment=describe_environment(pipe._execution_device.type),
        emulated=find_emulation(),
    )


def check_prompts(prompts, pipe_kwargs) -> list[str]:
    """The prompts as a list of at least one; empty words where embeddings stand for them."""
    if prompts is None and pipe_kwargs.get("prompt_embeds") is not None:
        return [""] * len(pipe_kwargs["prompt_embeds"])
    prompts = [prompts] if isinstance(prompts, str) else prompts
    if not isinstance(prompts, (list, tuple)) or not prompts:
        raise ValidationError(f"prompts: got {prompts!r}, expected a prompt or a list of prompts.")
    for index, prompt in enumerate(prompts):
        if not isinstance(prompt, str):
            raise ValidationError(f"prompts[{index}]: got {prompt!r}, expected words.")
    return list(prompts)


def check_pipeline(pipe):
    """Returns the pipeline if it can be diagnosed.

    Raises:
        ValidationError: No UNet or transformer, a scheduler that diffusers would not know, or
            components on different devices that no offloading hook moves.
    """
    components = find_components(pipe)
    scheduler = getattr(pipe, "scheduler", None)
    for method in ("set_timesteps", "step"):
        if not callable(getattr(scheduler, method, None)):
            raise ValidationError(
                f"scheduler: {type(scheduler).__name__} has no {method}(), expected one of "
                "diffusers' schedulers. Set pipe.scheduler."
            )
    devices = {
        name: parameter.device
        for name, component in components.items()
        if not hasattr(component, "_hf_hook")  # offloaded: moved when it is called
        for parameter in component.parameters()
    }
    if len(set(devices.values())) > 1:
        seen = ", ".join(f"{name} on {device}" for name, device in devices.items())
        raise ValidationError(f"pipe: {seen}. Expected one device: say pipe.to(device) first.")
    return pipe


def run_guarded(pipe, prompts, seed, pipe_kwargs) -> Run:
    """One pipeline call as the user makes it, under the guard."""
    count = len(prompts) * pipe_kwargs.get("num_images_per_prompt", 1)
    generators = [torch.Generator("cpu").manual_seed(seed + i) for i in range(count)]
    arguments = {"generator": generators, **pipe_kwargs, "output_type": "np"}
    if "prompt_embeds" not in pipe_kwargs:
        arguments["prompt"] = prompts
    watch = ModuleWatch()
    with guard(pipe) as report, watch.installed(find_components(pipe)):
        try:
            output = pipe(**arguments)
        except NonFiniteError:
            return Run(finding=report[0], call=report.bad_call, suspect=watch.find_first_bad())
    censored = getattr(output, "nsfw_content_detected", None)
    return Run(images=np.asarray(output.images), is_censored=tuple(censored or ()))


def examine_finding(pipe, run, call) -> Diagnosis:
    """From the guard's finding to the op and its cause."""
    finding = run.finding
    if finding.stage == "scheduler":
        return examine_between_calls(pipe, finding, call)
    if finding.tensor != "output":
        return blame_input(pipe, finding)
    return examine_call(pipe, run)


def blame_input(pipe, finding) -> Diagnosis:
    """What the caller handed in was bad on arrival."""
    stage = "vae" if finding.component.startswith("vae") else "unet"
    step = 0 if stage == "unet" and finding.step is None else finding.step
    evidence = {
        "argument": finding.tensor,
        "what_it_is": finding.stage,
        "nan_count": finding.nan_count,
        "inf_count": finding.inf_count,
        "total": finding.total,
        **find_bad_tables(pipe.scheduler),
    }
    remedy = f"Pass finite {finding.stage.replace('_', ' ')}, or let the pipeline make its own."
    return Diagnosis(
        stage, step, finding.component.partition(".")[0], None, "bad-input", evidence, remedy
    )


def examine_between_calls(pipe, finding, call) -> Diagnosis:
    """Bad latents that no component made: guidance, the scheduler's step, or a callback did."""
    tables = find_bad_tables(pipe.scheduler)
    bad = find_first_bad_op(call, find_components(pipe), outside_only=True)
    step = finding.step or 0
    if tables:
        cause = Cause(
            "bad-input", tables, "Make the scheduler anew: type(scheduler).from_config(its config)."
        )
    elif bad:
        cause = find_cause(bad)
    else:
        cause = Cause("undecided", {"replay": "the op did not break again"}, "Run it once more.")
    return describe("unet", step, None, bad, cause)


def find_bad_tables(scheduler) -> dict:
    """{"scheduler.sigmas": "3 of 26 values are NaN or Inf"} of a scheduler's own numbers."""
    found = {}
    for name, value in vars(scheduler).items():
        if isinstance(value, (torch.Tensor, np.ndarray, float)):
            values = torch.as_tensor(value).detach().cpu()
            bad = int((~values.isfinite()).sum())
            if bad:
                found[f"scheduler.{name}"] = f"{bad} of {values.numel()} values are NaN or Inf"
    return found


def examine_call(pipe, run) -> Diagnosis:
    """Makes the call that broke again, with the inputs it had, under the op-level trace."""
    finding, call = run.finding, run.call
    root = call.component.partition(".")[0]
    component = getattr(pipe, root)
    bad, replays, memory = break_again(pipe, call, {root: component})
    if bad is None:
        return describe_fleeting(finding, root, run.suspect, is_compiled(component))
    cause = find_cause(bad)
    replay = {"replays": replays}
    if memory:
        replay["fresh_memory_in_the_replay"] = f"filled with {memory} on purpose"
    if is_compiled(component):
        replay["compiled"] = "found in an eager replay; what was compiled was not looked into"
    cause = replace(cause, evidence={**cause.evidence, **replay})
    return describe(finding.stage, finding.step, bad.module, bad, cause)


def break_again(pipe, call, modules):
    """Replays a call until it breaks: (the bad op or None, replays, what fresh memory held)."""
    for replays, memory in enumerate(MEMORIES, start=1):
        bad = find_first_bad_op(lambda: make_call(pipe, call), modules, memory=memory)
        if bad:
            return bad, replays, memory
    return None, len(MEMORIES), None


def make_call(pipe, call: ComponentCall):
    """Calls a component again: `unet`, or a method as `vae.decode`."""
    function = pipe
    for name in call.component.split("."):
        function = getattr(function, name)
    with torch.no_grad():
        return function(*call.args, **call.kwargs)


def is_compiled(component) -> bool:
    """Whether `torch.compile` or `module.compile` is on a component or within it."""
    return any(
        module._compiled_call_impl is not None or type(module).__name__ == "OptimizedModule"
        for module in component.modules()
    )


def describe_fleeting(finding, root, suspect, compiled) -> Diagnosis:
    """The same call on the same inputs broke once and never again."""
    evidence = {
        "finite_replays": f"{len(MEMORIES)} of {len(MEMORIES)}, one with fresh memory of NaN",
        "nan_count": finding.nan_count,
        "inf_count": finding.inf_count,
    }
    if compiled:
        evidence["compiled"] = "the replays were eager: the compiled graph itself is a suspect"
    remedy = (
        "The same inputs gave another result when the call was repeated, so the kernel is not "
        "deterministic: upgrade torch, and run this module in float32 or on the CPU meanwhile."
    )
    module = suspect or root
    return describe(
        finding.stage, finding.step, module, None, Cause("backend-fault", evidence, remedy)
    )


def describe(stage, step, module, bad: BadOp | None, cause: Cause) -> Diagnosis:
    """Puts a place and a cause together; a fault of the backend gets its reproduction."""
    evidence, script = cause.evidence, None
    breaks_its_contract = cause.name == "uninitialised-memory" and bad.call.ignored
    if bad and (cause.name == "backend-fault" or breaks_its_contract):
        script = write_reproduction(bad)
        if not shows_the_fault(script):
            script = None
            evidence = {**evidence, "reproduction": "inputs drawn anew do not show it"}
    return Diagnosis(
        stage=stage,
        step=step,
        module=plain_path(cause.module or module),
        op=bad and bad.op,
        cause=cause.name,
        evidence=evidence,
        remedy=cause.remedy,
        reproduction=script,
        bad_op=bad,
    )


def plain_path(path: str | None) -> str | None:
    """A module's path without what torch.compile puts into it."""
    return path and path.replace("_orig_mod.", "").removesuffix("._orig_mod")


def examine_images(pipe, run, call) -> Diagnosis:
    """Nothing NaN came out of any component: is an image bad all the same, and why?"""
    verdicts = [judge_image(image) for image in run.images]
    is_black = [verdict.problem == "all-black" for verdict in verdicts]
    means = [float(np.mean(image)) for image in run.images]
    evidence = {
        "images": len(verdicts),
        "valid_images": sum(verdict.valid for verdict in verdicts),
        "mean_brightness": min(means),
        "brightest_pixel": float(np.max(run.images)),
    }
    if any(run.is_censored):
        return Diagnosis(
            "safety_checker", None, "safety_checker", None, "safety-checker",
            {**evidence, "flagged_images": sum(run.is_censored), "black_images": sum(is_black)},
            "No number is broken: another prompt, or safety_checker=None where that is allowed.",
        )  # fmt: skip
    if all(verdict.valid for verdict in verdicts) and min(means) >= DARK_MEAN:
        return Diagnosis(
            "none", None, None, None, "healthy", {**evidence, **find_hidden_overflow(pipe, call)}
        )
    hidden = find_swallowed(pipe, call)
    if hidden:
        return hidden
    return examine_dark(pipe, call, evidence)


def find_swallowed(pipe, call) -> Diagnosis | None:
    """A NaN that an op made and another lost, so that the guard at the borders saw nothing."""
    bad, step = find_in_whole_run(pipe, call, "swallowed")
    if bad is None:
        return None
    stage = stage_of(bad.module)
    made = find_cause(bad)
    evidence = {"made_by": made.name, **made.evidence, "swallowed_by": bad.swallowed_by}
    return describe(
        stage, step, bad.module, bad, replace(made, name="hidden-nan", evidence=evidence)
    )


def find_in_whole_run(pipe, call, look_for):
    """The op that the trace stops at in a whole run, and its step (None outside of the UNet)."""
    components = find_components(pipe)
    denoiser = components.get("unet", components.get("transformer"))
    calls = []
    handle = denoiser.register_forward_pre_hook(lambda *_: calls.append(1))
    try:
        bad = find_first_bad_op(call, components, look_for=look_for)
    finally:
        handle.remove()
    return bad, len(calls) - 1 if bad and stage_of(bad.module) == "unet" else None


def stage_of(module: str) -> str:
    """The stage that a module's path belongs to."""
    root = module.partition(".")[0]
    if root.startswith("text_encoder"):
        return "text_encoder"
    return "vae" if root == "vae" else "unet"


def examine_dark(pipe, call, evidence) -> Diagnosis:
    """Black, flat or dark without a NaN anywhere: float32 tells lost precision from the model."""
    components = find_components(pipe)
    if any(component.dtype in LOW_DTYPES for component in components.values()):
        with in_float32(pipe):
            twin = call()
        if twin.is_valid and float(np.mean(twin.images)) >= DARK_MEAN:
            evidence["float32_mean_brightness"] = float(np.mean(twin.images))
            return describe_underflow(*find_in_whole_run(pipe, call, "flushed"), evidence)
        evidence["float32_is_dark_too"] = True
    if evidence["valid_images"] or evidence["brightest_pixel"] > 0:
        return Diagnosis(
            "none", None, None, None, "dark-but-valid", evidence,
            "Nothing is broken: another seed, prompt or scheduler makes a brighter image.",
        )  # fmt: skip
    return Diagnosis(
        "none", None, None, None, "undecided", evidence,
        "Every number is finite and float32 draws the same: look at the VAE's weights and at the "
        "latents it is given (output_type='latent').",
    )  # fmt: skip


def describe_underflow(bad, step, evidence) -> Diagnosis:
    """float32 draws an image where float16 drew none, and nothing overflowed."""
    if bad is None:
        remedy = "Load the pipeline in float32, then component by component in float16."
        return Diagnosis("none", None, None, None, "undecided", evidence, remedy)
    component = bad.module.partition(".")[0]
    output = bad.outputs[0]
    cause = Cause(
        "underflow",
        {**evidence, "float16_largest": output.largest},
        f'Load {component} in float32: `load_pipeline(dtype={{"{component}": "float32"}})`; its '
        "values are too small for this dtype.",
    )
    stage = stage_of(bad.module)
    return describe(stage, step, bad.module, bad, cause)


def find_hidden_overflow(pipe, call) -> dict:
    """Whether diffusers' own rescue hides a fault: SDXL lifts a float16 VAE to float32.

    It does so while `vae.config.force_upcast` is set. The same latents are decoded once more in
    float16 to see what the rescue spares.
    """
    vae = getattr(pipe, "vae", None)
    is_lifted = vae is not None and getattr(vae.config, "force_upcast", False)
    if not is_lifted or vae.dtype is not torch.float16 or "XL" not in type(pipe).__name__:
        return {}
    decoded = []
    handle = vae.decoder.register_forward_pre_hook(lambda _, args: decoded.append(args[0]))
    try:
        call()
    finally:
        handle.remove()

    def decode_in_float16():
        with torch.no_grad():
            return vae.decoder(decoded[-1].half())

    bad = find_first_bad_op(decode_in_float16, {"vae": vae})
    if bad is None:
        return {"force_upcast": "diffusers decoded in float32; float16 would have been finite too"}
    found = find_cause(bad)
    return {
        "force_upcast": "diffusers decoded in float32, which hides a fault of this VAE in float16",
        "hidden_cause": found.name,
        "hidden_module": bad.module,
        "hidden_op": bad.op,
    }

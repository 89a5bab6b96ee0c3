"""From the guard's finding to the op and its cause: the call that broke is made again.

It has the very inputs that it had, under the op-level trace: first as it is, then with fresh memory
filled with NaN, for a fault that depends on memory may not come back by itself.
"""

from contextlib import ExitStack
from dataclasses import replace
from inspect import signature

import numpy as np
import torch

from sdkit.diagnosis.cause import Cause, find_cause
from sdkit.diagnosis.diagnosis import Diagnosis
from sdkit.diagnosis.place import describe, place_of, stage_of
from sdkit.diagnosis.trace import find_first_bad_op
from sdkit.diagnosis.whole_run import find_in_whole_run, list_modules
from sdkit.finding import ComponentCall, Finding, describe_bad, find_tensors
from sdkit.guarding import find_components
from sdkit.loading.modules import find_module
from sdkit.validation import is_finite

# What fresh memory holds in each replay, until one breaks again.
REPLAY_MEMORIES = (None, "nan", None)


def examine_finding(pipe, run, call) -> Diagnosis:
    """From the guard's finding to the op and its cause."""
    finding = run.finding
    if finding.stage == "scheduler":
        return examine_between_calls(pipe, finding, call)
    if finding.tensor != "output":
        return find_maker(pipe, finding, call) or blame_input(pipe, finding, call)
    return examine_call(pipe, run)


def find_maker(pipe, finding, call) -> Diagnosis | None:
    """Who made what a component was given: a part without a guard, or the pipeline's own code.

    None if it was bad before the run began: the caller handed it in.
    """
    if find_bad_tables(pipe.scheduler):
        return None
    bad, step = find_in_whole_run(pipe, call)
    if bad is None or bad.inherited or bad.changed_after:
        return None
    step = finding.step or 0 if stage_of(place_of(bad)) == "unet" else step
    return describe(stage_of(place_of(bad)), step, bad.module, bad, find_cause(bad))


def blame_input(pipe, finding, call) -> Diagnosis:
    """What the caller handed in was bad on arrival."""
    if finding.stage == "conditioning" and (fed := find_first_fed(pipe, call)):
        finding = replace(fed, step=finding.step)
    stage = stage_of(finding.component)
    step = finding.step or 0 if stage == "unet" else None
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


def find_first_fed(pipe, call) -> Finding | None:
    """What a part without a guard was given first that was bad: a ControlNet, an image encoder."""
    found = []

    def look_from(name, module):
        parameters = list(signature(module.forward).parameters)

        def look(module, args, kwargs):
            given = dict(zip(parameters, args, strict=False)) | kwargs
            for argument, value in given.items():
                if "mask" in argument:  # -inf is how a mask says no
                    continue
                bad = (tensor for tensor in find_tensors(value) if not is_finite(tensor))
                where = ("conditioning", None, None, name, argument)
                found.extend(describe_bad(tensor, *where) for tensor in bad)

        return look

    with ExitStack() as undo:
        for name in list_modules(pipe).keys() - find_components(pipe).keys():
            module = getattr(pipe, name)
            hook = module.register_forward_pre_hook(look_from(name, module), with_kwargs=True)
            undo.callback(hook.remove)
        call()
    return found[0] if found else None


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
    return describe("unet", step, bad and bad.module, bad, cause)


def find_bad_tables(scheduler) -> dict:
    """{"scheduler.sigmas": "3 of 26 values are NaN or Inf"} of a scheduler's own numbers.

    A scheduler made anew from the same configuration is the measure: KDPM2's tables hold NaN where
    nothing reads it.
    """
    found = count_bad(scheduler)
    if not found:
        return {}
    anew = type(scheduler).from_config(scheduler.config)
    if getattr(scheduler, "num_inference_steps", None):
        anew.set_timesteps(scheduler.num_inference_steps)
    usual = count_bad(anew)
    return {
        f"scheduler.{name}": f"{bad} of {total} values are NaN or Inf"
        for name, (bad, total) in found.items()
        if bad > usual.get(name, (0, 0))[0]
    }


def count_bad(scheduler) -> dict:
    """{table: (bad values, values)} of the tables with NaN or Inf."""
    found = {}
    for name, value in vars(scheduler).items():
        if isinstance(value, (torch.Tensor, np.ndarray, float)):
            values = torch.as_tensor(value).detach().cpu()
            bad = int((~values.isfinite()).sum())
            if bad:
                found[name] = (bad, values.numel())
    return found


def examine_call(pipe, run) -> Diagnosis:
    """Makes the call that broke again, with the inputs it had, under the op-level trace."""
    finding, call = run.finding, run.call
    root = call.component.partition(".")[0]
    component = getattr(pipe, root)
    bad, replays, memory = break_again(pipe, call, {root: component})
    if bad is None:
        return describe_fleeting(pipe, finding, run.suspect or root)
    cause = find_cause(bad)
    replay = {"replays": replays}
    if memory:
        replay["fresh_memory_in_the_replay"] = f"filled with {memory} on purpose"
    cause = replace(cause, evidence={**cause.evidence, **replay})
    return describe(finding.stage, finding.step, bad.module, bad, cause)


def break_again(pipe, call, modules):
    """Replays a call until it breaks: (the bad op or None, replays, what fresh memory held)."""
    for replays, memory in enumerate(REPLAY_MEMORIES, start=1):
        bad = find_first_bad_op(lambda: make_call(pipe, call), modules, memory=memory)
        if bad:
            return bad, replays, memory
    return None, len(REPLAY_MEMORIES), None


def make_call(pipe, call: ComponentCall):
    """Calls a component again: `unet`, or a method as `vae.decode`."""
    function = pipe
    for name in call.component.split("."):
        function = getattr(function, name)
    with torch.no_grad():
        return function(*call.args, **call.kwargs)


def describe_fleeting(pipe, finding, suspect) -> Diagnosis:
    """The same call on the same inputs broke once and never again."""
    module = find_module(pipe, suspect)
    evidence = {
        "finite_replays": f"all {len(REPLAY_MEMORIES)}, one with fresh memory of NaN",
        "nan_count": finding.nan_count,
        "inf_count": finding.inf_count,
    }
    if module._forward_hooks or module._forward_pre_hooks:
        evidence["hooks"] = f"{suspect} has hooks of somebody else's, which may count calls"
        remedy = "Take the hooks off and run it again: with them, kernel and hook cannot be told."
        cause = Cause("undecided", evidence, remedy)
    else:
        remedy = (
            "The same inputs gave another result when the call was repeated, so the kernel is not "
            "deterministic: upgrade torch, and run this module in float32 or on the CPU meanwhile."
        )
        cause = Cause("backend-fault", evidence, remedy)
    return describe(finding.stage, finding.step, suspect, None, cause)

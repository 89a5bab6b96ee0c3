"""From the guard's finding to the op and its cause: the call that broke is made again.

It has the very inputs that it had, under the op-level trace: first as it is, then with fresh memory
filled with NaN, for a fault that depends on memory may not come back by itself.
"""

from dataclasses import replace

import numpy as np
import torch

from sdkit.diagnosis.cause import Cause, find_cause
from sdkit.diagnosis.diagnosis import Diagnosis
from sdkit.diagnosis.place import describe
from sdkit.diagnosis.trace import find_first_bad_op
from sdkit.finding import ComponentCall
from sdkit.guarding import find_components

MEMORIES = (None, "nan", None)  # what fresh memory holds in each replay until one breaks again


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

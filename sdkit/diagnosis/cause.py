"""From the evidence on one bad op to its cause, what would refute it, and the smallest remedy.

The order of the questions is the argument: a bad weight explains everything after it; a mask that
hides every key has no right answer; memory that must not be read is found by changing it; only then
does the size of the numbers decide between overflow and a backend that is wrong.
"""

import math
from dataclasses import dataclass, field

from sdkit.diagnosis.experiments import (
    breaks_in_float32,
    compare_with_reference,
    count_masked_rows,
    depends_on_memory,
)
from sdkit.diagnosis.op_record import BadOp

CAUSES = (
    "healthy",
    "range-overflow",
    "uninitialised-memory",
    "backend-fault",
    "bad-weights",
    "bad-input",
    "masked-softmax",
    "invalid-arithmetic",
    "hidden-nan",
    "safety-checker",
    "underflow",
    "dark-but-valid",
    "undecided",
)
# What would show that a cause is the wrong one, and the smallest thing to try first.
REFUTED_BY = {
    "range-overflow": "a float32 replay of the op that is not above the dtype's maximum",
    "uninitialised-memory": "the same NaN with memory that holds zeros",
    "backend-fault": "the same NaN from the CPU in float32",
    "bad-weights": "NaN that stays when these weights are replaced",
    "bad-input": "NaN that stays with the pipeline's own inputs",
    "masked-softmax": "a mask that leaves every row at least one key",
    "invalid-arithmetic": "a finite result of the same op on the same inputs in float64",
    "hidden-nan": "no NaN in any op of the run",
    "safety-checker": "the same black image without the safety checker",
    "underflow": "the same flat image in float32",
    "dark-but-valid": "a bright image from the same seed in float32",
    "healthy": "an invalid image from the same call",
    "undecided": "",
}


@dataclass(frozen=True)
class Cause:
    """Why, how that is known, and what to do.

    Attributes:
        name: One of `CAUSES`.
        evidence: Numbers and findings, {what: value}, JSON types.
        remedy: One sentence, the smallest change first.
        module: Dotted path of the module to blame, where it is not the one that ran the op.
    """

    name: str
    evidence: dict = field(default_factory=dict)
    remedy: str = ""
    module: str | None = None


def find_cause(bad: BadOp) -> Cause:
    """Decides why an op gave NaN or Inf, by experiments on the op alone."""
    if bad.changed_after:
        return blame_unseen_write(bad)
    if bad.bad_weights:
        return blame_weights(bad, bad.bad_weights)
    cast_weights = tuple(name for summary in bad.inputs for name in summary.weights)
    if "_to_copy" in bad.op and cast_weights:
        return blame_weights(bad, cast_weights)
    if not bad.module and (written := find_written_constants(bad)):
        return Cause(
            "bad-input",
            {"written_as_a_number": written},
            f"Something outside the model writes NaN or Inf: see {bad.source}.",
        )
    if bad.inherited:
        return Cause(
            "bad-input",
            {"arrived_bad": list(bad.inherited)},
            "Check the tensor that the call was given, or that its module keeps.",
        )
    masked, rows = count_masked_rows(bad.call)
    if masked:
        return Cause(
            "masked-softmax",
            {"fully_masked_rows": masked, "rows": rows},
            "Leave every query at least one key in the attention mask; a row of -inf alone has no "
            "softmax.",
        )
    return judge_memory(bad) or judge_numbers(bad)


def find_written_constants(bad: BadOp) -> list[str]:
    """Names of the numbers that are NaN or Inf as they were written down."""
    numbers = {n: v for n, v in bad.call.named.items() if isinstance(v, float)}
    return [name for name, value in numbers.items() if not math.isfinite(value)]


def blame_unseen_write(bad: BadOp) -> Cause:
    """What an op had left finite was bad when it was looked at again, and no op ran on it."""
    changed = bad.outputs[0]
    evidence = {
        "changed": "between two ops, without an op",
        "finite_after": bad.changed_after,
        "nan_count": changed.nan_count,
        "inf_count": changed.inf_count,
        "hooks": list(bad.hooks),
    }
    suspect = ", ".join(bad.hooks) or bad.module or "the code between two modules"
    remedy = f"Something writes past torch: look for numpy, pointers or an extension in {suspect}"
    if changed.device != "cpu":
        remedy += ", or for a kernel that writes where it must not"
    return Cause("bad-input", evidence, f"{remedy}.")


def blame_weights(bad: BadOp, names) -> Cause:
    """Bad weights; Inf and no NaN is what a cast to float16 makes of a weight above 65504."""
    summaries = [summary for summary in bad.inputs if set(summary.weights) & set(names)]
    nan_count = sum(summary.nan_count for summary in summaries)
    inf_count = sum(summary.inf_count for summary in summaries)
    is_cast = "_to_copy" in bad.op or (
        inf_count and not nan_count and summaries[0].dtype == "float16"
    )
    remedy = (
        "Load this component in float32 or bfloat16: the weight is above float16's 65504, and its "
        "cast made Inf."
        if is_cast
        else "Replace the weights: load the checkpoint again and compare its checksum."
    )
    evidence = {
        "weights": list(names),
        "nan_count": nan_count,
        "inf_count": inf_count,
        "overflowed_in_the_cast": bool(is_cast),
    }
    return Cause("bad-weights", evidence, remedy, names[0].rpartition(".")[0])


def judge_memory(bad: BadOp) -> Cause | None:
    """Whether a buffer that must not be read, or that nobody wrote, decides the result."""
    heals = depends_on_memory(bad.call)
    if not heals:
        return None
    evidence = {
        "finite_with_zeroed_buffer": True,
        "ignored_by_contract": list(bad.call.ignored),
        "uninitialised": list(bad.call.undefined),
    }
    if not bad.call.undefined:
        return Cause(
            "backend-fault",
            evidence,
            f"{bad.op} reads a buffer that its contract tells it to ignore: upgrade torch, or take "
            "an attention that does not use it (`load_pipeline(attention="
            '"sdpa")`).',
        )
    remedy = (
        'Use SDPA instead of this attention (`load_pipeline(attention="sdpa")`, '
        "`pipe.unet.set_attn_processor(AttnProcessor2_0())`), or torch 2.14 or newer on a Mac."
        if "baddbmm" in bad.op
        else f"Give the op zeros instead of fresh memory (torch.zeros for torch.empty) near "
        f"{bad.source}."
    )
    return Cause("uninitialised-memory", evidence, remedy)


def judge_numbers(bad: BadOp) -> Cause:
    """Overflow, invalid arithmetic, or a backend that is wrong: what float64 on the CPU says."""
    reference = compare_with_reference(bad.call)
    if reference is None:
        return Cause(
            "undecided",
            {"float64_reference": "this op has none on the CPU"},
            "Run the same prompt with dtype float32: NaN there too speaks against the range.",
        )
    evidence = {
        "bad_values": reference.bad_count,
        "of_these_float64_fits": reference.fitting_count,
        "of_these_float64_is_above_the_maximum": reference.overflowing_count,
        "of_these_float64_is_nan": reference.nan_count,
        "of_these_float64_is_inf": reference.inf_count,
        "float64_largest": reference.largest,
        "dtype_maximum": reference.maximum,
    }
    is_infinite_by_itself = divides(bad.op) or "inf" in bad.options.values()
    if reference.nan_count or (reference.inf_count and is_infinite_by_itself):
        return Cause(
            "invalid-arithmetic",
            evidence,
            f"No precision helps: {bad.op} has no finite answer for these inputs (0/0, inf-inf, "
            f"log of 0). Mend the formula at {bad.source}.",
        )
    if reference.overflowing_count + reference.inf_count >= reference.fitting_count:
        dtype = next(s.dtype for s in bad.outputs if s.nan_count or s.inf_count)
        component = bad.module.partition(".")[0]
        remedy = (
            f'Run {bad.module} in float32; `load_pipeline(dtype={{"{component}": "float32"}})` does'
            " it for the whole component."
            if component
            else f"Smaller guidance_scale, or everything in float32: it overflows at {bad.source}."
        )
        if dtype == "float32":
            remedy = "No wider dtype is at hand: look at what makes such large numbers."
        return Cause(
            "range-overflow", evidence, f"{remedy} {dtype} ends at {reference.maximum:.5g}."
        )
    if breaks_in_float32(bad.call):
        return Cause(
            "range-overflow",
            {**evidence, "float32_on_the_cpu": "NaN or Inf as well: within the op, not its result"},
            f"The inputs of {bad.op} are too large for float32's own range; see what made them.",
        )
    return Cause(
        "backend-fault",
        evidence,
        f"The same numbers fit on the CPU, so the kernel is wrong: upgrade torch, or run "
        f"{bad.module} in float32 or on the CPU meanwhile, and report the reproduction.",
    )


def divides(op: str) -> bool:
    return any(name in op for name in ("div", "reciprocal", "log", "rsqrt", "pow"))

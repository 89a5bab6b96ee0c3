"""From a model's name to a diagnosis, as `sdkit diagnose` does it: load, emulate if asked, look."""

import warnings
from contextlib import ExitStack

from sdkit.attention import allow_unsafe_attention
from sdkit.diagnosis.diagnosis import Diagnosis
from sdkit.diagnosis.examination import diagnose
from sdkit.emulate import FAULTS, EmulationWarning, mps
from sdkit.emulate.memory import MEMORIES
from sdkit.loading import load_pipeline
from sdkit.validation import ValidationError

PROMPT = "A professional product photo of black casual shoes"  # the report's first


def diagnose_model(
    model,
    prompts=None,
    *,
    backend="auto",
    dtype="auto",
    attention="sdpa",
    memory=None,
    faults=None,
    **arguments,
) -> Diagnosis:
    """Loads a pipeline and diagnoses it.

    Args:
        model: As in `load_pipeline`.
        prompts: What to draw; by default the report's first prompt.
        backend: As in `load_pipeline`; an emulation is on the CPU.
        dtype: As in `load_pipeline`.
        attention: As in `load_pipeline`.
        memory: What fresh memory of an emulated Mac holds; None without `faults` emulates nothing.
        faults: Names of its faults; by default, on a `memory`, `baddbmm-beta-zero`.
        **arguments: For `diagnose`, and through it for the pipeline call.

    Returns:
        A Diagnosis.

    Raises:
        ValidationError: What was asked for cannot be had.
    """
    is_emulated = memory is not None or bool(faults)
    faults = tuple(faults or ("baddbmm-beta-zero",))
    check_names("memory", [memory or "zeros"], MEMORIES)
    check_names("fault", faults, FAULTS)
    with ExitStack() as stack:
        stack.enter_context(allow_unsafe_attention())  # to show what it does is what this is for
        pipe, _ = load_pipeline(
            model, backend="cpu" if is_emulated else backend, dtype=dtype, attention=attention
        )
        if is_emulated:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", EmulationWarning)  # the diagnosis says it
                stack.enter_context(mps(memory or "zeros", faults))
        return diagnose(pipe, list(prompts or [PROMPT]), **arguments)


def check_names(what, names, known):
    """Raises for a name that is not known, with those that are."""
    for name in names:
        if name not in known:
            raise ValidationError(f"{what}: got {name!r}, expected one of {', '.join(known)}.")

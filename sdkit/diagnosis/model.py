"""From a model's name to a diagnosis, as `sdkit diagnose` does it: load, emulate if asked, look."""

from contextlib import nullcontext
from functools import partial

from sdkit.attention import allow_unsafe_attention
from sdkit.diagnosis.diagnosis import Diagnosis
from sdkit.diagnosis.examination import diagnose
from sdkit.diagnosis.guarded_run import takes
from sdkit.emulate import FAULTS
from sdkit.emulate.again import emulate_again
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
        prompts: What to draw; by default the report's first prompt, if the pipeline takes one.
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
    emulation = choose_emulation(memory, faults)
    with allow_unsafe_attention():  # to show what it does is what this is for
        pipe, _ = load_pipeline(
            model, backend="cpu" if emulation else backend, dtype=dtype, attention=attention
        )
        with emulation() if emulation else nullcontext():
            default = PROMPT if takes(pipe, "prompt") else None
            return diagnose(pipe, prompts or default, **arguments)


def choose_emulation(memory, faults):
    """The emulation that a command line asks for, as a function without arguments, or None.

    Args:
        memory: What fresh memory holds, or None.
        faults: Names of faults, or None; by default, on a `memory`, `baddbmm-beta-zero`.

    Raises:
        ValidationError: An unknown name, with those that there are.
    """
    if memory is None and not faults:
        return None
    faults = tuple(faults or ("baddbmm-beta-zero",))
    check_names("memory", [memory or "zeros"], MEMORIES)
    check_names("fault", faults, FAULTS)
    settings = {"memory": memory or "zeros", "faults": faults, "seed": 0}
    return partial(emulate_again, settings)  # in silence: what is printed says that it is emulated


def check_names(what, names, known):
    """Raises for a name that is not known, with those that are."""
    for name in names:
        if name not in known:
            raise ValidationError(f"{what}: got {name!r}, expected one of {', '.join(known)}.")

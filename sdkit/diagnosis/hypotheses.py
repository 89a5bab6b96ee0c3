"""Three explanations of the black images, what each predicts, and which of them a device refutes.

The predictions are not taken on trust: each explanation can be planted on the emulated device, and
the runs must then come out as it says.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from sdkit.diagnosis.ablation import (
    FAULTY,
    HONEST,
    OWN,
    Cell,
    load_for_trial,
    run_cell,
)
from sdkit.diagnosis.specimens import overflow_vae, raise_scores

MIXED = {"default": "float16", "vae": "float32"}


@dataclass(frozen=True)
class Trial:
    """One run that tells explanations apart.

    Attributes:
        name: What is run.
        dtype: As in `load_pipeline`.
        attention: As in `load_pipeline`.
        memory: What fresh memory of the emulated device holds.
        real_memory: The same on a real device; None where it cannot be had there.
        guards_beta: Whether `baddbmm` is the one of torch 2.14, which ignores what it must.
    """

    name: str
    dtype: str | dict
    attention: str
    memory: str
    real_memory: str | None
    guards_beta: bool = False


@dataclass(frozen=True)
class Hypothesis:
    """One explanation.

    Attributes:
        name: In a few words.
        says: What is broken, in a sentence.
        predicts: {trial: "valid", or the stage that breaks first}.
        faults: What the emulated device gets wrong if it is true.
        plant: What the model must be like, `plant(pipe, score)`; None for as it is.
    """

    name: str
    says: str
    predicts: Mapping[str, str]
    faults: tuple[str, ...] = ()
    plant: Callable | None = None


TRIALS = (
    Trial("float16, slicing (the report, before)", "float16", "diffusers-sliced",
          "stale_float32", "as it comes"),
    Trial("float32, slicing (the report, after)", "float32", "diffusers-sliced",
          "stale_float32", "as it comes"),
    Trial("float16, no slicing", "float16", "sdpa", "stale_float32", "as it comes"),
    Trial("float16, slicing, memory zeroed", "float16", "diffusers-sliced", "zeros", "zeros"),
    Trial("float32, slicing, memory of NaN", "float32", "diffusers-sliced", "nan", "nan"),
    Trial("float16, slicing, torch 2.14's baddbmm", "float16", "diffusers-sliced",
          "stale_float32", None, guards_beta=True),
    Trial("float16 UNet, float32 VAE, slicing", MIXED, "diffusers-sliced",
          "stale_float32", "as it comes"),
)  # fmt: skip
REPORTED = {TRIALS[0].name: "bad", TRIALS[1].name: "valid"}  # all that the report ran


def _predict(*outcomes):
    return dict(zip((trial.name for trial in TRIALS), outcomes, strict=True))


HYPOTHESES = (
    Hypothesis(
        "stale memory",
        "baddbmm reads a buffer that beta=0 tells it to ignore, and the buffer holds old bytes.",
        _predict("unet", "valid", "valid", "valid", "unet", "valid", "unet"),
        faults=("baddbmm-beta-zero",),
    ),
    Hypothesis(
        "early rounding",
        "Q.K^T is rounded to float16 before it is scaled, and is too large for it.",
        _predict("unet", "valid", "unet", "unet", "valid", "unet", "unet"),
        faults=("score-rounding",),
        plant=raise_scores,
    ),
    Hypothesis(
        "VAE in float16",
        "Numbers inside the VAE are too large for float16.",
        _predict("vae", "valid", "vae", "vae", "valid", "vae", "valid"),
        plant=lambda pipe, score: overflow_vae(pipe),
    ),
)


def run_trials(model, prompt, *, hypothesis=None, score=None, backend="auto", **arguments):
    """Runs the trials where a hypothesis is true, or on the device as it is.

    Args:
        model: As in `load_pipeline`.
        prompt: What to draw.
        hypothesis: What to plant on the emulated device; None plants nothing, and on a CPU then
            emulates the fault that MPS is documented to have.
        score: A `Score` of this model, for early rounding.
        backend: As in `load_pipeline`.
        **arguments: For `generate`.

    Returns:
        {trial: Cell}, without the trials that a real device cannot run.
    """
    cells = {}
    faults = hypothesis.faults if hypothesis else HYPOTHESES[0].faults
    for trial in TRIALS:
        pipe, is_emulated = load_for_trial(model, backend, trial.dtype, trial.attention)
        memory = trial.memory if is_emulated else trial.real_memory
        if memory is None:
            continue
        if hypothesis and hypothesis.plant:
            hypothesis.plant(pipe, score)
        kept = [name for name in faults if not (trial.guards_beta and name == "baddbmm-beta-zero")]
        kernel = (HONEST if trial.guards_beta else FAULTY) if is_emulated else OWN
        found = run_cell(
            pipe, prompt, memory=memory, faults=kept if is_emulated else None, **arguments
        )
        cells[trial.name] = Cell(trial.dtype, trial.attention, kernel, memory, **found)
    return cells


def find_survivors(outcomes: Mapping[str, str]) -> tuple[str, ...]:
    """Names of the hypotheses that no outcome contradicts.

    Args:
        outcomes: {trial: "valid", the stage that broke, or "bad" where the stage is not known}.
    """
    return tuple(
        hypothesis.name
        for hypothesis in HYPOTHESES
        if all(agrees(hypothesis.predicts[name], outcome) for name, outcome in outcomes.items())
    )


def agrees(predicted: str, outcome: str) -> bool:
    """Whether an outcome is what was predicted; "bad" is any stage."""
    return predicted == outcome or (outcome == "bad" and predicted != "valid")

"""The grid on the bundled model, the explanations planted, and what is sent in."""

import getpass
import json
import platform

import pytest
import torch

from sdkit import describe_environment, load_pipeline
from sdkit.diagnosis.ablation import (
    FAULTY,
    OWN,
    list_conditions,
    on_device,
    run_ablation,
    run_cell,
    save_outcomes,
)
from sdkit.diagnosis.hypotheses import (
    HYPOTHESES,
    REPORTED,
    TRIALS,
    agrees,
    find_survivors,
    run_trials,
)
from sdkit.diagnosis.timeline import measure_scores

SMALL = {"seed": 0, "image_size": 64, "num_inference_steps": 1, "guidance_scale": 4.0}
PROMPT = "black boots on grass"


@pytest.fixture(scope="module")
def cells():
    # float32's half of the grid is asked of notebook 01, in its check cell.
    return run_ablation("mini", PROMPT, backend="cpu", dtypes=("float16",), **SMALL)


def test_black_is_slicing_on_the_faulty_kernel_and_nothing_else(cells):
    assert len(cells) == 2 * len(list_conditions(is_emulated=True)) == 16
    broken = {(c.attention, c.kernel, c.memory) for c in cells if c.outcome != "valid"}
    assert broken == {
        ("diffusers-sliced", FAULTY, "stale_float32"),
        ("diffusers-sliced", FAULTY, "nan"),
    }
    assert {(c.outcome, c.step) for c in cells if c.problem} == {("unet", 0)}
    assert all((cell.image is None) == (cell.problem is not None) for cell in cells)


def test_on_a_real_device_only_memory_is_chosen():
    assert list_conditions(is_emulated=False) == (
        (OWN, "as it comes"), (OWN, "zeros"), (OWN, "nan"),
    )  # fmt: skip


@pytest.mark.parametrize(("memory", "filled"), [("zeros", 0.0), ("nan", float("nan"))])
def test_memory_of_a_real_device_holds_what_was_chosen(memory, filled):
    with on_device(memory):
        fresh = torch.empty(3, 4)
    assert torch.equal(fresh.isnan(), torch.full((3, 4), filled).isnan())
    assert memory == "nan" or not fresh.any()
    assert not torch.are_deterministic_algorithms_enabled()


def test_nan_is_filled_in_where_somebody_switched_that_off(monkeypatch):
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", False)
    with on_device("nan"):
        assert torch.empty(3, 4).isnan().all()
    assert not torch.utils.deterministic.fill_uninitialized_memory


def test_a_cell_runs_on_the_real_device_too():
    pipe, _ = load_pipeline("mini", backend="cpu", dtype="float32", attention="diffusers-sliced")
    for memory in ("as it comes", "zeros", "nan"):
        found = run_cell(pipe, PROMPT, memory=memory, faults=None, **SMALL)
        assert found["problem"] is None and found["emulated"] is None


@pytest.fixture(scope="module")
def score():
    pipe, _ = load_pipeline("mini", backend="cpu", dtype="float32")
    call = {name: value for name, value in SMALL.items() if name != "image_size"}
    scores = measure_scores(pipe, PROMPT, height=64, width=64, **call)
    return max((s for s in scores if s.module.startswith("unet")), key=lambda s: s.unscaled)


@pytest.mark.parametrize(
    "hypothesis",
    # All of them are planted by notebook 01, too, and its check cell judges them as this does.
    [HYPOTHESES[0], *(pytest.param(one, marks=pytest.mark.slow) for one in HYPOTHESES[1:])],
    ids=lambda hypothesis: hypothesis.name,
)
def test_what_is_planted_gives_what_it_predicts_and_is_all_that_survives(hypothesis, score):
    cells = run_trials("mini", PROMPT, hypothesis=hypothesis, score=score, backend="cpu", **SMALL)
    outcomes = {name: cell.outcome for name, cell in cells.items()}
    assert outcomes == dict(hypothesis.predicts)
    assert find_survivors(outcomes) == (hypothesis.name,)


def test_the_two_runs_of_the_report_refute_nothing():
    assert set(REPORTED) <= {trial.name for trial in TRIALS}
    assert len(find_survivors(REPORTED)) == len(HYPOTHESES) == 3
    assert find_survivors({TRIALS[0].name: "valid"}) == ()
    assert agrees("unet", "bad") and not agrees("valid", "bad") and not agrees("unet", "vae")


def test_what_is_sent_in_holds_outcomes_and_nothing_personal(cells, tmp_path):
    path = save_outcomes(
        tmp_path / "send_in.json", cells, model=str(tmp_path / "my-model"),
        environment=describe_environment("cpu"), settings=SMALL, verdicts=("stale memory",),
    )  # fmt: skip
    text = path.read_text()
    content = json.loads(text)
    assert content["model"] == "my-model" and len(content["cells"]) == len(cells)
    assert content["cells"][0]["memory"] == "zeros" and "image" not in content["cells"][0]
    for personal in (str(tmp_path), platform.node(), f"/{getpass.getuser()}", PROMPT):
        assert personal not in text

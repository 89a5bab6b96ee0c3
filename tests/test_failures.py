"""Every rung on planted failures: the cause decides which rungs cure."""

import pytest
from test_plan import scale_inside

from sdkit.precision.failures import FAILURES, HEALTHY, Failure, choose_failures, climb_failures
from sdkit.precision.ladder_table import tabulate_ladder
from sdkit.precision.rungs import AS_IT_IS, FLOAT32, HOW
from sdkit.validation import ValidationError

FAST = {"num_inference_steps": 1, "progress": False, "backend": "cpu"}
RUNGS = set(HOW)
BY_NAME = {failure.name: failure for failure in FAILURES}


def overflow_inside(pipe):
    scale_inside(pipe.unet, "mid_block.resnets.0", 17)


def test_failures_are_chosen_by_name_and_the_control_stays():
    assert choose_failures() == FAILURES
    names = [failure.name for failure in choose_failures(["VAE overflow", "early rounding"])]
    assert names == [HEALTHY.name, "early rounding", "VAE overflow"]
    with pytest.raises(ValidationError, match="'VAE' is not known; expected nothing"):
        choose_failures(["VAE"])


@pytest.mark.slow  # notebook 02 climbs the same ladder on the bundled model
def test_every_rung_is_run_and_the_planted_cause_decides(tiny_folder):
    planted = Failure("UNet overflow", overflow_inside)
    failures = (HEALTHY, planted, BY_NAME["stale memory"], BY_NAME["one NaN weight"])
    table = tabulate_ladder(climb_failures(tiny_folder, "a shoe", failures=failures, **FAST))
    assert set(table["rung"]) == RUNGS and len(table) == len(failures) * len(RUNGS)

    def find(failure, column):
        return set(table[(table["failure"] == failure.name) & table[column]]["rung"])

    assert find(HEALTHY, "proven") == RUNGS
    assert {"rebalanced float16", "planned float16", FLOAT32} <= find(planted, "proven")
    assert not find(planted, "proven") & {AS_IT_IS, "float16, safe slicing", "float16, VAE float32"}
    assert find(failures[2], "proven") == {
        "newer torch (emulated)", "float16, SDPA", "float16, safe slicing"
    }  # fmt: skip
    assert FLOAT32 in find(failures[2], "only hides")  # the report's cure
    assert not find(failures[3], "proven") and not find(planted, "only hides")
    assert table["seconds an image"].isna().all()  # it was emulated
    assert (table[table["rung"] == FLOAT32]["weight share"] == 1).all()


def test_what_is_switched_over_weighs_both(tiny_folder):
    failures = (Failure("UNet overflow", overflow_inside),)
    several_calls = FAST | {"num_inference_steps": 2}
    (rungs,) = climb_failures(tiny_folder, "a shoe", failures=failures, **several_calls).values()
    by_name = {rung.name: rung for rung in rungs}
    assert "then switched over" in by_name["float16, rescued"].note
    assert by_name["float16, rescued"].weight_bytes > by_name[FLOAT32].weight_bytes


def test_a_sick_model_is_no_reference(tiny_pipe, tmp_path):
    tiny_pipe.unet.conv_in.weight.data[0] = float("nan")
    tiny_pipe.save_pretrained(tmp_path)
    with pytest.raises(ValidationError, match="NaN"):
        climb_failures(tmp_path, "a shoe", **FAST)

"""The ladder on every failure: one table, one figure, and advice that follows from the numbers."""

import numpy as np
import pytest
from test_plan import scale_inside

from sdkit.precision.fixing import HOW
from sdkit.precision.ladder import Rung
from sdkit.precision.ladder_table import (
    AS_IT_IS,
    FAILURES,
    HEALTHY,
    Failure,
    climb_failures,
    plot_ladder,
    recommend,
    tabulate_ladder,
)
from sdkit.validation import ValidationError

FAST = {"num_inference_steps": 2, "progress": False, "backend": "cpu"}
RUNGS = set(HOW)
NOISE = np.random.default_rng(0).random((1, 16, 16, 3))


def rung(name, size, psnr_db, valid=1):
    images = NOISE if valid else None
    return Rung(name, "", valid, 1, size, psnr_db if valid else None, 1.0, images=images)


def climbed(**failures):
    """{failure: rungs}; the control's float16 reaches 55 dB."""
    whole = rung("float32", 100, float("inf"))
    failures = {HEALTHY.name: [rung(AS_IT_IS, 50, 55.0), whole], **failures}
    return {
        name: rungs if rungs[-1] is whole else [*rungs, whole] for name, rungs in failures.items()
    }


def advise(device, **failures):
    kinds = [HEALTHY, *(Failure(name, None, "sdpa", ("mps", "cuda", "cpu")) for name in failures)]
    advice = recommend(tabulate_ladder(climbed(**failures)), kinds)
    return advice[(advice["device"] == device) & (advice["failure"] != HEALTHY.name)].iloc[0]


def test_every_rung_is_run_and_the_planted_cause_decides(tiny_folder):
    def overflow(pipe):
        scale_inside(pipe.unet, "mid_block.resnets.0", 17)

    planted = Failure("UNet overflow", overflow, "sdpa", ("mps",))
    failures = (HEALTHY, planted, FAILURES[-1])
    table = tabulate_ladder(climb_failures(tiny_folder, "a shoe", failures=failures, **FAST))
    assert set(table["rung"]) == RUNGS and len(table) == 3 * len(RUNGS)
    proven = {
        failure.name: set(table[(table["failure"] == failure.name) & table["proven"]]["rung"])
        for failure in failures
    }
    assert proven[HEALTHY.name] == RUNGS
    assert {"rebalanced float16", "planned float16", "float32"} <= proven["UNet overflow"]
    assert not proven["UNet overflow"] & {AS_IT_IS, "float16, safe slicing", "float16, VAE float32"}
    assert not proven["one NaN weight"]
    assert table["seconds an image"].isna().all()  # it was emulated
    assert (table[table["rung"] == "float32"]["weight share"] == 1).all()


def test_a_sick_model_is_no_reference(tiny_pipe, tmp_path):
    tiny_pipe.unet.conv_in.weight.data[0] = float("nan")
    tiny_pipe.save_pretrained(tmp_path)
    with pytest.raises(ValidationError, match="NaN"):
        climb_failures(tmp_path, "a shoe", **FAST)


def test_the_lightest_rung_that_is_as_good_as_healthy_float16_is_advised():
    rungs = [rung("bfloat16", 50, 44.0), rung("rebalanced float16", 50, 54.5),
             rung("float16, VAE float32", 60, 58.0)]  # fmt: skip
    assert advise("mps", overflow=rungs)["do"] == "rebalanced float16"
    assert advise("mps", overflow=rungs[::2])["do"] == "float16, VAE float32"
    assert advise("mps", overflow=rungs[:1])["do"] == "float32"


def test_invalid_images_are_never_advised_and_a_cpu_gets_no_float16():
    rungs = [rung(AS_IT_IS, 50, 60.0, valid=0), rung("rebalanced float16", 50, 54.5)]
    assert advise("cuda", overflow=rungs)["do"] == "rebalanced float16"
    assert advise("cpu", overflow=rungs)["do"] == "float32"


def test_what_nothing_cures_is_told():
    dead = [rung(name, 50, None, valid=0) for name in HOW if name != "float32"]
    dead = {"weights": [*dead, rung("float32", 100, None, valid=0)]}
    table = tabulate_ladder({**climbed(), **dead})
    advice = recommend(table, [HEALTHY, Failure("weights", None, "sdpa", ("mps",))])
    assert "mend" in advice[advice["failure"] == "weights"]["do"].item()


def test_the_figure_has_a_tile_for_each_failure_and_rung():
    figure = plot_ladder(climbed(overflow=[rung(AS_IT_IS, 50, None, valid=0)]), heading="Ladder")
    below = [ax.get_xlabel() for ax in figure.axes]
    assert below == [
        "1/1 · 0.50x\n55 dB",
        "1/1 · 1.00x\nthe same",
        "0/1 · 0.50x",
        "1/1 · 1.00x\nthe same",
    ]
    assert [text.get_text() for text in figure.axes[2].texts] == ["NaN"]

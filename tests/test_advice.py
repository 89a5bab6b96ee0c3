"""What to do on which device follows from the ladder's numbers."""

import pandas as pd

from sdkit.precision.advice import NOTHING_CURES, recommend, tell_advice
from sdkit.precision.costs import Cost
from sdkit.precision.failures import HEALTHY
from sdkit.precision.rungs import AS_IT_IS, FLOAT32, NEWER_TORCH

QUICK = {name: Cost(name, "cpu", 1.0, 40.0, 60.0) for name in ("float16", "bfloat16", FLOAT32)}
SLOW_HALF = {**QUICK, "float16": Cost("float16", "cpu", 1.6, 40.0, 60.0)}


def row(rung, share, psnr_db, failure="overflow", hides=False):
    proven = psnr_db is not None and not hides
    return {
        "failure": failure, "rung": rung, "weight share": share, "PSNR dB": psnr_db,
        "proven": proven, "only hides": hides,
    }  # fmt: skip


def advise(*rows, costs=QUICK, emulated=True, about="overflow"):
    """{device: what to do about one failure}; the control's float16 reaches 55 dB."""
    control = [
        row(name, share, psnr_db, HEALTHY.name)
        for name, share, psnr_db in (
            (AS_IT_IS, 0.5, 55.0), (NEWER_TORCH, 0.5, 55.0), (FLOAT32, 1.0, float("inf")),
        )
    ]  # fmt: skip
    rows = [*rows, row(FLOAT32, 1.0, float("inf"))]
    advice = recommend(pd.DataFrame([*control, *rows]), costs, 55.0, emulated=emulated)
    return {one.device: one for one in advice if one.failure == about}


BRAIN, MOVED = row("bfloat16", 0.5, 44.0), row("rebalanced float16", 0.5, 54.5)
VAE = row("float16, VAE float32", 0.65, 58.0)


def test_the_lightest_rung_that_is_as_good_as_healthy_float16_is_advised():
    assert advise(BRAIN, VAE, MOVED)["mps"].do == "rebalanced float16"
    assert advise(BRAIN, VAE)["mps"].do == "float16, VAE float32"
    assert advise(BRAIN)["mps"].do == FLOAT32
    assert advise(BRAIN, VAE, MOVED)["mps"].others == 3
    assert advise(MOVED)["mps"].how.startswith('sdkit fix MODEL, then load_pipeline("runs/fix')


def test_what_is_invalid_or_only_hides_the_fault_is_never_advised():
    invalid, hiding = row(AS_IT_IS, 0.5, None), row("planned float16", 0.5, 55.0, hides=True)
    advice = advise(invalid, hiding, VAE)["mps"]
    assert advice.do == "float16, VAE float32" and advice.only_hide == ("planned float16",)
    text = tell_advice([advice])
    assert "only hide overflow: planned float16" in text and "0.65x" in text


def test_a_kernel_fault_is_not_held_against_devices_that_do_not_have_it():
    rungs = [row(AS_IT_IS, 0.5, None), row(NEWER_TORCH, 0.5, 55.0)]
    rungs += [row("bfloat16", 0.5, 54.9, hides=True)]
    advice = advise(*rungs, VAE, costs=SLOW_HALF)
    assert advice["mps"].do == NEWER_TORCH and "pip install" in advice["mps"].how
    assert advice["cuda"].do == AS_IT_IS
    assert advice["cpu"].do == "bfloat16" and advice["cpu"].only_hide == ()


def test_a_dtype_that_is_slow_here_is_not_offered_here():
    assert advise(MOVED, VAE, costs=SLOW_HALF)["cpu"].do == FLOAT32
    assert advise(MOVED, VAE, costs=SLOW_HALF)["cuda"].do == "rebalanced float16"


def test_numbers_of_a_device_tell_about_that_device_alone():
    assert set(advise(MOVED)) == {"mps", "cuda", "cpu"}
    assert set(advise(MOVED, emulated=False)) == {"cpu"}


def test_what_nothing_cures_is_told():
    weights = [row(name, 0.5, None, "weights") for name in (AS_IT_IS, NEWER_TORCH, FLOAT32)]
    advice = advise(*weights, about="weights")["mps"]
    assert advice.do == NOTHING_CURES and advice.weight_share is None
    assert "mend the model" in tell_advice([advice])

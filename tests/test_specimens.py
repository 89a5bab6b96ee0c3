"""Each specimen is diagnosed as its cause, and the exact ones change nothing in float32."""

import numpy as np
import pytest
import torch

from sdkit import diagnose
from sdkit.diagnosis.specimens import overflow_unet, overflow_vae, raise_scores, spoil_weight
from sdkit.diagnosis.timeline import measure_scores
from sdkit.emulate import mps

FAST = {"num_inference_steps": 2}
OVERFLOWS = [overflow_unet, overflow_vae]


def draw(pipe):
    generator = torch.Generator().manual_seed(0)
    return pipe("a shoe", generator=generator, output_type="np", **FAST).images


@pytest.mark.parametrize("plant", OVERFLOWS)
def test_an_overflow_leaves_the_float32_image_as_it_is_to_the_last_bit(tiny_pipe, plant):
    before = draw(tiny_pipe)
    plant(tiny_pipe)
    assert np.array_equal(draw(tiny_pipe), before)


@pytest.mark.parametrize(
    ("plant", "stage", "cause"),
    [
        (overflow_unet, "unet", "range-overflow"),
        (overflow_vae, "vae", "range-overflow"),
        (spoil_weight, "unet", "bad-weights"),
    ],
)
def test_each_is_diagnosed_as_what_it_is_and_proven(tiny_pipe, plant, stage, cause):
    truth = plant(tiny_pipe.to(torch.float16))
    with mps(faults=()):
        diagnosis = diagnose(tiny_pipe, "a shoe", prove=True, **FAST)
    assert (diagnosis.stage, diagnosis.cause, diagnosis.module) == (stage, cause, truth)
    assert diagnosis.proven is True


@pytest.mark.parametrize("plant", OVERFLOWS)
def test_the_weights_themselves_still_fit(tiny_pipe, plant):
    plant(tiny_pipe)
    weights = [p for c in (tiny_pipe.unet, tiny_pipe.vae) for p in c.parameters()]
    assert all(bool(weight.to(torch.float16).isfinite().all()) for weight in weights)


def test_raised_scores_fit_once_they_are_scaled_and_not_before(tiny_pipe):
    attentions = measure_scores(tiny_pipe, "a shoe", **FAST)
    score = max((s for s in attentions if s.module.startswith("unet")), key=lambda s: s.unscaled)
    assert raise_scores(tiny_pipe, score) == score.module
    after = {s.module: s for s in measure_scores(tiny_pipe, "a shoe", **FAST)}[score.module]
    assert after.scaled < 65504 < after.unscaled
    assert np.isfinite(draw(tiny_pipe)).all()

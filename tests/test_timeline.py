"""What the modules put out is measured as it is, in order, and nothing stays on the pipeline."""

import math

import pytest
import torch

from sdkit.diagnosis.specimens import overflow_unet, spoil_weight
from sdkit.diagnosis.timeline import measure_activations, measure_scores

FAST = {"num_inference_steps": 3, "guidance_scale": 1.0}


def count_hooks(pipe):
    components = (pipe.text_encoder, pipe.unet, pipe.vae)
    modules = [module for component in components for module in component.modules()]
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in modules)


def test_every_step_and_stage_is_there_in_order(tiny_pipe):
    activations = measure_activations(tiny_pipe, ["a shoe", "a boot"], **FAST)
    stages = list(dict.fromkeys((a.stage, a.step) for a in activations))
    steps = [step for stage, step in stages if stage == "unet"]
    assert stages[0] == ("text_encoder", None) and stages[-1] == ("vae", None)
    assert steps == list(range(len(steps))) and len(steps) >= 3
    assert all(activation.largest >= 0 for activation in activations)
    assert count_hooks(tiny_pipe) == 0


def test_the_number_is_the_largest_of_the_output(tiny_pipe):
    seen = []
    handle = tiny_pipe.unet.conv_out.register_forward_hook(
        lambda module, args, output: seen.append(float(output.abs().max()))
    )
    activations = measure_activations(tiny_pipe, "a shoe", **FAST)
    handle.remove()
    assert [a.largest for a in activations if a.module == "unet.conv_out"] == seen


def test_an_overflow_shows_in_float32_where_nothing_breaks(tiny_pipe):
    path = overflow_unet(tiny_pipe)
    above = {
        a.module for a in measure_activations(tiny_pipe, "a shoe", **FAST) if a.largest > 65504
    }
    assert above == {path}


def test_nan_is_told_and_does_not_stop_the_run(tiny_pipe):
    spoil_weight(tiny_pipe)
    activations = measure_activations(tiny_pipe, "a shoe", **FAST)
    assert math.isnan(activations[-1].largest)


def test_scores_are_those_of_the_queries_and_keys(tiny_pipe):
    found = {}
    attention = tiny_pipe.unet.down_blocks[0].attentions[0].transformer_blocks[0].attn1
    for name in ("to_q", "to_k"):
        getattr(attention, name).register_forward_hook(
            lambda module, args, output, name=name: found.setdefault(name, []).append(output)
        )
    scores = {score.module: score for score in measure_scores(tiny_pipe, "a shoe", **FAST)}
    score = scores["unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1"]
    wanted = 0.0
    for query, key in zip(found["to_q"], found["to_k"], strict=True):
        query, key = (t.unflatten(-1, (attention.heads, -1)).transpose(1, 2) for t in (query, key))
        wanted = max(wanted, float((query @ key.mT).max()))
    assert score.unscaled == pytest.approx(wanted, rel=1e-5)
    assert score.scaled == pytest.approx(wanted * attention.scale, rel=1e-5)
    assert torch.is_tensor(found["to_q"][0])

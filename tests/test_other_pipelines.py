"""`diagnose` and `guard` on pipelines without a prompt, with a movq, a ControlNet, frames."""

import pytest
import torch
from other_pipelines import (
    animated,
    controlled,
    embed_an_image,
    give_edges,
    give_edges_with_nan,
    kandinsky,
    unconditional,
)
from planting import INF, NAN, set_weight

from sdkit import diagnose, guard
from sdkit.guarding import NonFiniteError
from sdkit.validation import ValidationError

FAST = {"num_inference_steps": 2}
MOVQ = "movq.decoder.mid_block.resnets.0.conv1"


def test_a_pipeline_that_takes_no_prompt_needs_none(tokenizer_folder):
    pipe = unconditional(tokenizer_folder)
    assert diagnose(pipe, **FAST).is_healthy
    with pytest.raises(ValidationError, match="DDPMPipeline takes none"):
        diagnose(pipe, "a shoe", **FAST)


def test_one_that_takes_a_prompt_says_so(tiny_pipe):
    with pytest.raises(ValidationError, match="prompts: got None"):
        diagnose(tiny_pipe, **FAST)


def test_a_movq_is_a_vae(tokenizer_folder):
    pipe = kandinsky(tokenizer_folder)
    inputs = embed_an_image(pipe)
    set_weight(MOVQ, NAN)(pipe)
    with guard(pipe) as report, pytest.raises(NonFiniteError, match=r"movq\.decode"):
        pipe(**inputs, **FAST)
    assert report[0].stage == "vae"
    found = diagnose(pipe, prove=True, **inputs, **FAST)
    assert (found.stage, found.module, found.cause) == ("vae", MOVQ, "bad-weights")
    assert found.proven


def test_what_a_controlnet_makes_is_put_down_to_it(tokenizer_folder):
    pipe = controlled(tokenizer_folder)
    set_weight("controlnet.conv_in", INF, name="bias")(pipe)
    found = diagnose(pipe, "a shoe", prove=True, **give_edges(pipe), **FAST)
    assert (found.stage, found.step, found.module) == ("unet", 0, "controlnet.conv_in")
    assert (found.cause, found.proven) == ("bad-weights", True)


@pytest.mark.parametrize("after", ["conv_in", "controlnet_mid_block"])
def test_what_a_controlnet_makes_and_repairs_is_told(tokenizer_folder, after):
    """No guard is on it: within it, and where it hands on what it made."""
    pipe = controlled(tokenizer_folder)
    module = pipe.controlnet.get_submodule(after)
    module.register_forward_hook(lambda module, args, output: (output / 0 * 0).nan_to_num(0.0))
    found = diagnose(pipe, "a shoe", **give_edges(pipe), **FAST)
    assert (found.stage, found.step, found.module) == ("unet", 0, f"controlnet.{after}")
    assert found.cause == "hidden-nan"


def test_an_edge_image_with_nan_is_bad_input(tokenizer_folder):
    pipe = controlled(tokenizer_folder)
    found = diagnose(pipe, "a shoe", **give_edges_with_nan(pipe), **FAST)
    assert (found.stage, found.step, found.module) == ("unet", 0, "controlnet")
    assert (found.cause, found.evidence["argument"]) == ("bad-input", "controlnet_cond")
    assert found.evidence["nan_count"] == 2  # one for each half of the guidance


def test_every_frame_of_a_video_is_looked_at(tokenizer_folder):
    pipe = animated(tokenizer_folder)
    call = {"num_frames": 3, "height": 64, "width": 64, **FAST}
    assert diagnose(pipe, "a", **call).evidence["valid_images"] == 3
    postprocess = pipe.video_processor.postprocess_video

    def blacken_the_last(video, **kwargs):
        frames = postprocess(video, **kwargs)
        frames[:, -1] = 0
        return frames

    pipe.video_processor.postprocess_video = blacken_the_last
    found = diagnose(pipe, "a", **call)
    assert not found.is_healthy and found.evidence["valid_images"] == 2


def test_what_makes_no_picture_is_refused(tokenizer_folder):
    pipe = unconditional(tokenizer_folder)
    pipe.__class__ = type("Sound", (type(pipe),), {"__call__": lambda self, generator=None: 3})
    with pytest.raises(ValidationError, match="gives int, expected images or the frames"):
        diagnose(pipe)


def test_a_callback_that_writes_nan_is_named_and_proved(tiny_pipe):
    def spoil(pipe, step, timestep, given):
        return {"latents": torch.full_like(given["latents"], NAN)} if step == 1 else given

    found = diagnose(tiny_pipe, "a", callback_on_step_end=spoil, prove=True, **FAST)
    assert (found.stage, found.step, found.cause) == ("unet", 1, "bad-input")
    assert found.bad_op.source.startswith("test_other_pipelines.py")
    assert found.proven and found.proof.startswith("no callback")

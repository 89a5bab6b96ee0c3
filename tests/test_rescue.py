"""One bad call is made again in float32, and the run goes on; what cannot be rescued is told."""

import json

import numpy as np
import pytest
import torch

from sdkit import RunRecord, generate
from sdkit.emulate import Fault, float16_arithmetic, mps
from sdkit.finding import NonFiniteError
from sdkit.generation.rescue import SWITCH_AFTER

FAST = {"num_inference_steps": 6, "progress": False, "on_nonfinite": "rescue"}
CALLS = 7  # PNDM makes one more than its steps


def strike_float16(shape, calls):
    """A convolution kernel that gives NaN in float16, in some of its calls at this output shape."""
    count = iter(range(10_000))

    def apply(func, args, kwargs, compute):
        result = compute(func, args, kwargs)
        if tuple(result.shape) == shape and result.dtype is torch.float16 and next(count) in calls:
            result[0, 0, 0, 0] = float("nan")
        return result

    return mps(faults=(Fault("strike", ("aten.convolution",), (), "", apply),))


UNET_OUTPUT, IMAGE = (2, 4, 8, 8), (1, 3, 64, 64)


def draw(pipe, prompts="a shoe", **options):
    return generate(pipe, prompts, **{**FAST, **options})


def measure_psnr(image, other):
    difference = np.asarray(image, float) - np.asarray(other, float)
    return 10 * np.log10(255**2 / max(1e-9, np.square(difference).mean()))


def test_a_bad_step_is_made_again_and_the_run_goes_on(tiny_pipe):
    pipe = tiny_pipe.to(torch.float16)
    with mps(faults=()):
        healthy = draw(pipe)
    with strike_float16(UNET_OUTPUT, {2, 4}):
        record = draw(pipe)
    assert record.valid_count == 1
    assert [(r["component"], r["call"]) for r in record.rescue["rescues"]] == [
        ("unet", 2),
        ("unet", 4),
    ]
    assert record.rescue["calls"]["unet"] == CALLS and not record.rescue["switched_over"]
    assert "rescued in float32: unet 2 of 7 calls" in str(record)
    assert measure_psnr(record.images[0].pil_image, healthy.images[0].pil_image) > 40


def test_a_compiled_unet_is_rescued(tiny_pipe):
    tiny_pipe.unet.compile(backend="eager")
    with strike_float16(UNET_OUTPUT, {2}):
        record = draw(tiny_pipe.to(torch.float16))
    assert record.valid_count == 1 and record.rescue["rescues"][0]["call"] == 2


def test_the_vae_is_rescued_too(tiny_pipe):
    with strike_float16(IMAGE, {0}):
        record = draw(tiny_pipe.to(torch.float16))
    assert [r["component"] for r in record.rescue["rescues"]] == ["vae.decode"]
    assert record.valid_count == 1


def test_an_overflow_on_every_call_switches_the_component_over(tiny_pipe):
    with torch.no_grad():
        tiny_pipe.unet.get_submodule("mid_block.resnets.0.conv1").weight *= 2.0**17
        tiny_pipe.unet.get_submodule("mid_block.resnets.0.norm2").eps *= 2.0**34
    pipe = tiny_pipe.to(torch.float16)
    with float16_arithmetic():
        record = draw(pipe, ["a shoe", "a boot"])
    assert record.valid_count == 2
    assert len(record.rescue["rescues"]) == SWITCH_AFTER
    assert "unet" in record.rescue["switched_over"] and "switched over" in str(record)
    assert pipe.unet.dtype is torch.float16 and "forward" not in vars(pipe.unet)


def test_what_float32_does_not_cure_raises_and_leaves_an_incident(tiny_pipe, tmp_path):
    def spoil(module, args, output):
        output[0, 0, 0, 0] = float("nan")

    tiny_pipe.unet.conv_out.register_forward_hook(spoil)
    with float16_arithmetic(), pytest.raises(NonFiniteError) as caught:
        draw(tiny_pipe.to(torch.float16), output_folder=tmp_path)
    assert caught.value.record.rescue["rescues"][0]["rescued"] is False
    assert (tmp_path / "incident_000" / "call.safetensors").is_file()
    assert not list(tmp_path.glob("*.png"))


def test_a_bad_input_is_not_rescued(tiny_pipe):
    latents = torch.full((1, 4, 8, 8), float("nan"))

    def spoil(pipe, step, timestep, tensors):
        return {"latents": latents.half()} if step == 1 else tensors

    with float16_arithmetic(), pytest.raises(NonFiniteError, match="after step 1"):
        draw(tiny_pipe.to(torch.float16), callback_on_step_end=spoil)


def test_a_healthy_run_is_left_alone_and_nothing_stays(tiny_pipe):
    before = [sorted(vars(m)) for m in tiny_pipe.unet.modules()]
    with float16_arithmetic():
        record = draw(tiny_pipe.to(torch.float16))
    assert record.rescue["rescues"] == [] and "rescued" not in str(record)
    assert [sorted(vars(m)) for m in tiny_pipe.unet.modules()] == before
    assert "decode" not in vars(tiny_pipe.vae)


def test_the_record_round_trips_and_older_ones_load(tiny_pipe, tmp_path):
    with strike_float16(UNET_OUTPUT, {1}):
        record = draw(tiny_pipe.to(torch.float16), output_folder=tmp_path)
    assert RunRecord.load(tmp_path / "record.json") == record
    content = json.loads(record.to_json())
    del content["rescue"]
    content["version"] = 2
    assert RunRecord.from_json(json.dumps(content)).rescue is None

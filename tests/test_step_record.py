"""The steps of a run: what is recorded is what happened, and recording changes nothing."""

import diffusers
import numpy as np
import pytest
import torch
from tiny_pipelines import build_tiny_flux_pipe, build_tiny_pipe

from sdkit import ValidationError, generate
from sdkit.generation.record import RunRecord, load_steps
from sdkit.generation.step_record import StepRecord

FAST = {"num_inference_steps": 4, "guidance_scale": 2, "progress": False}


def test_latents_and_ranges_are_those_of_the_run(tiny_pipe, tmp_path):
    latents, largest = [], []

    def note(pipe, step, timestep, values):
        latents.append(values["latents"].clone())
        return values

    conv = tiny_pipe.unet.down_blocks[0].resnets[0].conv1
    hook = conv.register_forward_hook(lambda m, a, output: largest.append(output.abs().max()))
    record = generate(
        tiny_pipe, ["a", "b"], batch_size=2, output_folder=tmp_path, record_steps=True,
        callback_on_step_end=note, **FAST,
    )  # fmt: skip
    hook.remove()
    (steps,) = load_steps(record)
    assert steps.images == (0, 1)
    expected = torch.stack(latents, dim=1).half().numpy()
    np.testing.assert_array_equal(steps.latents, expected)
    column = steps.modules.index("unet.down_blocks.0.resnets.0.conv1")
    np.testing.assert_array_equal(steps.largest[:, column], torch.stack(largest).numpy())
    assert steps.kinds[column] == "Conv2d"
    assert not steps.is_bad.any() and steps.first_bad is None
    assert [m.split(".")[0] for m in (steps.modules[0], steps.modules[-1])] == [
        "text_encoder", "vae",
    ]  # fmt: skip
    (loaded,) = load_steps(RunRecord.load(tmp_path / "record.json"))
    assert loaded.modules == steps.modules
    for name in ("largest", "nan_count", "inf_count", "total", "latents"):
        np.testing.assert_array_equal(getattr(loaded, name), getattr(steps, name))


@pytest.mark.parametrize("scheduler", ["DDIMScheduler", "EulerAncestralDiscreteScheduler"])
def test_recording_changes_no_pixel(tiny_pipe, scheduler, tmp_path):
    """diffusers asks `scheduler.step` for its parameters: hidden ones would lose eta and noise."""
    made = getattr(diffusers, scheduler).from_config(tiny_pipe.scheduler.config)
    tiny_pipe.scheduler = made
    call = {**FAST, "eta": 1.0} if scheduler == "DDIMScheduler" else FAST
    generators = [torch.Generator("cpu").manual_seed(0)]
    noise = torch.randn((1, 4, 8, 8), generator=generators[0])
    plain = tiny_pipe(
        ["boots"], latents=noise, generator=generators, output_type="np",
        **{name: value for name, value in call.items() if name != "progress"},
    ).images[0]  # fmt: skip
    record = generate(tiny_pipe, "boots", record_steps=True, output_folder=tmp_path, **call)
    assert "step" not in vars(made)
    assert not any(m._forward_hooks for m in tiny_pipe.unet.modules())
    kept = np.asarray(record.images[0].pil_image)
    np.testing.assert_array_equal(kept, (plain.clip(0, 1) * 255).round().astype(np.uint8))


@pytest.mark.parametrize(("value", "name"), [(torch.nan, "nan_count"), (torch.inf, "inf_count")])
def test_the_first_bad_output_is_found_in_module_and_step(tiny_pipe, tmp_path, value, name):
    calls = []

    def spoil(module, args, output):
        calls.append(1)
        return output.index_fill(0, torch.tensor([0]), value) if len(calls) == 3 else output

    tiny_pipe.unet.mid_block.resnets[0].conv1.register_forward_hook(spoil)
    record = generate(
        tiny_pipe, "boots", record_steps=True, output_folder=tmp_path, on_nonfinite="skip", **FAST
    )
    (steps,) = load_steps(RunRecord.load(tmp_path / "record.json"))
    step, module = steps.first_bad
    assert (step, steps.modules[module]) == (2, "unet.mid_block.resnets.0.conv1")
    assert getattr(steps, name)[step, module] == steps.total[step, module] // 2  # one guidance half
    assert not np.isfinite(steps.largest[step, module])
    assert not steps.is_bad[:2, ~steps.runs_once].any()
    assert record.valid_count == 0 and np.isfinite(steps.latents[0, :2]).all()
    assert not np.isfinite(steps.latents[0, 2]).any()


def test_a_run_that_is_stopped_keeps_its_steps(tiny_pipe, tmp_path):
    conv = tiny_pipe.unet.conv_out
    calls = []

    def spoil(module, args, output):
        calls.append(1)
        return output * torch.nan if len(calls) == 2 else output

    conv.register_forward_hook(spoil)
    with pytest.raises(ValidationError) as caught:
        generate(tiny_pipe, "boots", record_steps=True, output_folder=tmp_path, **FAST)
    (steps,) = load_steps(caught.value.record)
    assert steps.step_count == 2 and steps.latents.shape[1] == 1
    assert steps.modules[steps.first_bad[1]] == "unet.conv_out"


def test_only_what_was_asked_is_written_and_the_latents_are_kept(tiny_pipe, tmp_path):
    (tmp_path / "steps_000.npz").write_bytes(b"of an earlier run")
    record = generate(tiny_pipe, "boots", output_folder=tmp_path, **FAST)
    assert not list(tmp_path.glob("steps_*"))
    (steps,) = load_steps(record)
    count = len(tiny_pipe.scheduler.timesteps)
    assert steps.modules == () and steps.latents.shape == (1, count, 4, 8, 8)
    assert load_steps(RunRecord.load(tmp_path / "record.json")) == ()
    assert RunRecord.load(tmp_path / "record.json") == record


def test_large_latents_are_averaged_down_and_nan_stays():
    from sdkit.generation.step_recorder import shrink

    latents = torch.ones(1, 4, 130, 96)
    latents[0, 0, 0, 0] = torch.nan
    latents[0, 1, 0, 0] = 1e30
    small = shrink(latents, 64)
    assert small.shape == (1, 4, 44, 32) and small.dtype == np.float16
    assert np.isnan(small[0, 0, 0, 0]) and np.isnan(small).sum() == 1
    assert small[0, 1, 0, 0] == 65504 and (small[0, 2:] == 1).all()


def test_packed_latents_are_unpacked(tokenizer_folder):
    record = generate(build_tiny_flux_pipe(tokenizer_folder), "a", image_size=64, **FAST)
    (steps,) = load_steps(record)
    assert steps.latents.shape[:2] == (1, 4) and steps.latents.shape[-2] == steps.latents.shape[-1]


def test_what_cannot_be_watched_is_said(tokenizer_folder):
    pipe = build_tiny_pipe(tokenizer_folder)
    norms = (m for m in pipe.text_encoder.modules() if isinstance(m, torch.nn.LayerNorm))
    next(norms).compile(backend="eager")
    (steps,) = generate(pipe, "boots", record_steps=True, **FAST).steps
    assert "text_encoder is compiled" in steps.skipped[0]
    assert {path.partition(".")[0] for path in steps.modules} == {"unet", "vae"}


@pytest.mark.parametrize("damage", ["cut", "text", "empty", "other", "shape", "told", "bytes"])
def test_a_damaged_file_is_refused(tmp_path, damage):
    path = tmp_path / "steps_000.npz"
    zeros = np.zeros((2, 3))
    grids = dict.fromkeys(("largest", "nan_count", "inf_count", "total"), zeros)
    StepRecord(images=(0,), modules=tuple("abc"), kinds=("",) * 3, **grids).save(path)
    assert StepRecord.load(path).step_count == 2
    if damage == "cut":
        path.write_bytes(path.read_bytes()[:200])
    elif damage == "text":
        path.write_text("hello")
    elif damage == "empty":
        path.write_bytes(b"")
    elif damage == "other":
        np.savez(path, something=np.zeros(3))
    elif damage == "told":
        np.savez(path, told=np.array('"a word"'), **grids)
    elif damage == "bytes":  # of the compressed data
        content = bytearray(path.read_bytes())
        content[50:110] = bytes(range(100, 160))
        path.write_bytes(content)
    else:
        StepRecord(images=(0,), modules=("a",), kinds=("",), **grids).save(path)
    with pytest.raises(ValidationError, match=r"steps_000\.npz: no record of steps"):
        StepRecord.load(path)

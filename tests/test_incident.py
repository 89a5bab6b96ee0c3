"""An invalid image leaves a bundle; the bundle leads to the same finding, here or elsewhere."""

import errno
import json

import pytest
import torch
from PIL import Image

from sdkit import generate, load_pipeline
from sdkit.diagnosis.incident_replay import diagnose_incident, load_pipe
from sdkit.emulate import mps
from sdkit.finding import NonFiniteError
from sdkit.generation import incident as incident_module
from sdkit.generation.incident import load_incident
from sdkit.validation import ValidationError

FAST = {"num_inference_steps": 3, "progress": False}


@pytest.fixture
def sliced_pipe(tiny_folder):
    return load_pipeline(
        tiny_folder, backend="cpu", dtype="float16", attention="diffusers-sliced", progress=False
    )[0]


def make_incident(pipe, folder):
    with mps(memory="stale_float32"), pytest.raises(NonFiniteError):
        generate(pipe, ["a shoe", "a boot"], output_folder=folder, **FAST)
    return folder / "incident_000"


def test_the_bundle_reproduces_the_finding(sliced_pipe, tiny_folder, tmp_path):
    folder = make_incident(sliced_pipe, tmp_path)
    diagnosis = diagnose_incident(folder, model=tiny_folder, prove=True)
    assert (diagnosis.stage, diagnosis.step, diagnosis.cause) == ("unet", 0, "uninitialised-memory")
    assert diagnosis.evidence["came_back_here"] and diagnosis.proven
    assert "stale_float32" in diagnosis.emulated


def test_the_bundle_holds_the_last_finite_latents_and_nothing_personal(sliced_pipe, tmp_path):
    folder = make_incident(sliced_pipe, tmp_path)
    incident = load_incident(folder)
    assert incident.call.component == "unet"
    assert incident.call.args[0].shape == (2, 4, 8, 8) and incident.call.args[0].isfinite().all()
    assert incident.image["seed"] == 0 and incident.image["prompt"] == "a shoe"
    assert str(tmp_path) not in (folder / "incident.json").read_text()


def test_skip_leaves_a_bundle_for_each_bad_image_and_none_for_good_ones(tiny_pipe, tmp_path):
    calls = iter(range(100))

    def spoil(module, args, output):
        if next(calls) == 1:
            output[1, 0, 0, 0] = float("nan")

    tiny_pipe.unet.conv_out.register_forward_hook(spoil)
    generate(
        tiny_pipe, ["a", "b"], output_folder=tmp_path, on_nonfinite="skip", batch_size=2, **FAST
    )
    assert [path.name for path in sorted(tmp_path.glob("incident_*"))] == ["incident_001"]


def test_a_fault_that_stays_away_is_undecided_not_blamed(sliced_pipe, tiny_folder, tmp_path):
    folder = make_incident(sliced_pipe, tmp_path)
    content = json.loads((folder / "incident.json").read_text())
    content["emulation"]["faults"] = []
    (folder / "incident.json").write_text(json.dumps(content))
    diagnosis = diagnose_incident(folder, model=tiny_folder)
    assert diagnosis.cause == "undecided" and diagnosis.evidence["came_back_here"] is False


def test_a_black_image_without_nan_has_a_bundle_too(tiny_pipe, tmp_path):
    with torch.no_grad():
        tiny_pipe.vae.decoder.conv_out.weight.zero_()
        tiny_pipe.vae.decoder.conv_out.bias.fill_(-2)
    with pytest.raises(ValidationError, match="black"):
        generate(tiny_pipe, "a shoe", output_folder=tmp_path, **FAST)
    assert load_incident(tmp_path / "incident_000").call is None


@pytest.mark.parametrize("attention", ["sliced", "diffusers-sliced", "sdpa"])
def test_a_run_is_replayed_with_its_own_attention(tiny_folder, tmp_path, attention):
    pipe, _ = load_pipeline(tiny_folder, backend="cpu", attention=attention, progress=False)
    pipe.unet.conv_out.register_forward_hook(lambda *call: call[2].fill_(float("nan")))
    with pytest.raises(NonFiniteError):
        generate(pipe, "a shoe", output_folder=tmp_path, **FAST)
    replayed = load_pipe(load_incident(tmp_path / "incident_000"), tiny_folder, "cpu")
    kinds = [{type(p) for p in p.unet.attn_processors.values()} for p in (pipe, replayed)]
    assert kinds[0] == kinds[1]


def test_the_next_run_into_the_folder_takes_the_bundles_away(sliced_pipe, tmp_path):
    make_incident(sliced_pipe, tmp_path)
    with mps(memory="zeros"):
        generate(sliced_pipe, "a shoe", output_folder=tmp_path, **FAST)
    assert not list(tmp_path.glob("incident_*"))


def cut(name, count):
    return lambda folder: (folder / name).write_bytes((folder / name).read_bytes()[:count])


def rewrite(change):
    def spoil(folder):
        content = json.loads((folder / "incident.json").read_text())
        change(content)
        (folder / "incident.json").write_text(json.dumps(content))

    return spoil


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (cut("incident.json", 200), "damaged"),
        (cut("call.safetensors", 100), "damaged"),
        (lambda folder: (folder / "call.safetensors").unlink(), "damaged"),
        (lambda folder: (folder / "incident.json").unlink(), "has no incident.json"),
        (rewrite(lambda content: content.pop("image")), "incomplete"),
        (rewrite(lambda content: content.update(version=99)), "version 99"),
        (rewrite(lambda c: c["scheduler"].update({"class": "NoScheduler"})), "NoScheduler"),
        (rewrite(lambda c: c["emulation"].update(faults=["nobody"])), "nobody"),
        (rewrite(lambda c: c["run"].update(model="gone")), "gone"),
        (rewrite(lambda c: c["call"].update(component="unet.save_config")), "call.component"),
        (rewrite(lambda c: c["scheduler"].update({"class": "UNet2DModel"})), "UNet2DModel"),
        (rewrite(lambda c: c["run"].update(settings=[])), "run.settings"),
        (rewrite(lambda c: c.update(emulation=[1])), "emulation"),
        (rewrite(lambda c: c["image"].update(finding=None)), "image.finding"),
        (rewrite(lambda c: c["call"].update(args=[], kwargs={})), "does not fit"),
        (rewrite(lambda c: c["image"]["finding"].update(step=-1)), "image.finding"),
        (rewrite(lambda c: c["image"]["finding"].update(component=3)), "image.finding"),
        (rewrite(lambda c: c["image"].pop("finding")), "incomplete"),
        (rewrite(lambda c: c.update(emulation={"a": 1, "b": 2, "c": 3})), "emulation"),
        (rewrite(lambda c: c["emulation"].update(seed="x")), "emulation"),
        (rewrite(lambda c: c["run"].pop("model")), "incomplete"),
        (rewrite(lambda c: c["run"].update(attention=[[]])), "run.attention"),
        (rewrite(lambda c: c["scheduler"]["config"].update(beta_start="x")), "scheduler"),
    ],
)
def test_a_corrupt_bundle_is_one_clear_error(sliced_pipe, tmp_path, spoil, words):
    folder = make_incident(sliced_pipe, tmp_path)
    spoil(folder)
    with pytest.raises(ValidationError, match=words):
        diagnose_incident(folder, model=None if words == "gone" else "mini")


def test_a_full_disk_leaves_nothing_half_written(sliced_pipe, tmp_path, monkeypatch):
    def fill_the_disk(tensors, path):
        path.write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(incident_module, "save_file", fill_the_disk)
    with mps(memory="nan"), pytest.raises(ValidationError, match="No space left"):
        generate(sliced_pipe, "a shoe", output_folder=tmp_path, **FAST)
    assert not [path for path in tmp_path.rglob("*") if "incident" in path.name]


def test_an_argument_that_json_cannot_hold_is_named_and_left_out(
    sliced_pipe, tiny_folder, tmp_path
):
    def look(pipe, step, timestep, tensors):
        return tensors

    with mps(memory="nan"), pytest.raises(NonFiniteError):
        generate(sliced_pipe, "a", output_folder=tmp_path, callback_on_step_end=look, **FAST)
    diagnosis = diagnose_incident(tmp_path / "incident_000", model=tiny_folder, prove=True)
    assert diagnosis.evidence["not_in_the_bundle"] == ["callback_on_step_end"] and diagnosis.proven


def test_an_image_to_image_incident_is_not_proved_without_its_image(
    tiny_pipe, tiny_folder, tmp_path
):
    def spoil(module, args, output):
        output[0, 0, 0, 0] = float("nan")

    tiny_pipe.unet.conv_out.register_forward_hook(spoil)
    image = Image.new("RGB", (64, 64), (200, 90, 30))
    with pytest.raises(NonFiniteError):
        generate(tiny_pipe, "a", image=image, output_folder=tmp_path, **FAST)
    diagnosis = diagnose_incident(tmp_path / "incident_000", model=tiny_folder, prove=True)
    assert diagnosis.cause == "undecided" and diagnosis.evidence["came_back_here"] is False
    assert diagnosis.proven is None

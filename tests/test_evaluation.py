"""Did it learn: planted adapters and planted pictures are told; what cannot be judged is None."""

import json

import numpy as np
import pytest
import safetensors.torch
import torch
from tiny_pipelines import build_tiny_pipe
from tiny_training import make_config, make_encoded
from typer.testing import CliRunner

from sdkit import ValidationError, evaluate_lora, load_pipeline
from sdkit.cli import app
from sdkit.finetuning import evaluation_prompts
from sdkit.finetuning.adapter import add_adapter
from sdkit.finetuning.adapter_file import describe_training, pack_adapter
from sdkit.finetuning.catalogue_source import render_studio_pictures
from sdkit.finetuning.dataset import ImageCaptionDataset
from sdkit.finetuning.evaluation import measure_pictures
from sdkit.finetuning.evaluation_report import REPORT_FILE
from sdkit.mini.catalogue import render_dataset
from sdkit.mini.classifier import load_classifier

PROMPTS = ("a red shoe", "a blue boot", "a grey loafer")
QUICK = {
    "prompts": PROMPTS, "num_inference_steps": 2, "progress": False, "batch_size": 2,
}  # fmt: skip


@pytest.fixture(autouse=True)
def few_held_out(monkeypatch):
    monkeypatch.setattr(
        "sdkit.finetuning.catalogue_source.STUDIO_COUNTS",
        {"train": 2, "validation": 4, "test": 2},
    )


def write_adapter(pipe, folder, *, size=0.05, **changes):
    """Writes an adapter of random weights for a pipeline's model into a folder."""
    config = make_config(folder, **changes)
    metadata = describe_training(pipe, config, make_encoded(pipe))
    generator = torch.Generator().manual_seed(1)
    for parameter in add_adapter(pipe, config).values():
        parameter.data += size * torch.randn(parameter.shape, generator=generator)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "pytorch_lora_weights.safetensors"
    path.write_bytes(pack_adapter(pipe, metadata))
    return path


@pytest.fixture
def make_adapter(tokenizer_folder, tmp_path):
    def make(seed=0, **changes):
        return write_adapter(build_tiny_pipe(tokenizer_folder, seed=seed), tmp_path, **changes)

    return make


def edit_weights(path, change):
    """Writes an adapter anew with its first tensor changed, metadata and all."""
    with safetensors.safe_open(path, "pt") as file:
        metadata, weights = file.metadata(), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    name = sorted(weights)[0]
    weights[name] = change(weights[name])
    safetensors.torch.save_file(weights, path, metadata)
    return name


def run_unet(pipe):
    latents = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return pipe.unet(latents, 500, torch.zeros(1, 77, 32))[0]


def test_an_adapter_is_seen_and_taken_off_again(tiny_pipe, make_adapter, tmp_path):
    base = run_unet(tiny_pipe)
    report = evaluate_lora(
        make_adapter(), pipe=tiny_pipe, kept_prompts=["on grass"], output_folder=tmp_path / "out",
        **QUICK,
    )  # fmt: skip
    assert torch.equal(run_unet(tiny_pipe), base)
    assert report.before.valid == report.after.valid == 3
    assert (report.kept_before.asked, report.kept_after.asked) == (1, 1)
    assert report.drift > 0
    hashes = [
        [image.pixels_sha256 for image in run.images]
        for run in (report.run_before, report.run_after)
    ]
    assert all(a != b for a, b in zip(*hashes, strict=True))
    assert len(list((tmp_path / "out" / "after").glob("*.png"))) == 4
    saved = json.loads((tmp_path / "out" / REPORT_FILE).read_text())
    assert saved == json.loads(report.to_json())
    assert saved["after"]["white_border"] == report.after.white_border
    assert saved["settings"]["prompts"] == list(PROMPTS)


@pytest.mark.parametrize(("size", "code"), [(0.05, 0), (1e20, 1)])
def test_the_command_draws_measures_and_tells_by_its_exit_code(
    tiny_folder, tiny_pipe, tmp_path, size, code
):
    adapter = write_adapter(load_pipeline(tiny_folder, progress=False)[0], tmp_path, size=size)
    options = ["--model", tiny_folder, "--steps", 2, "--image-size", 32, "--output", tmp_path / "o"]
    for prompt in PROMPTS:
        options += ["--prompt", prompt]
    arguments = ["evaluate", adapter.parent, *options, "--kept-prompt", "grass", "--json"]
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == code, result.output
    told = json.loads(result.stdout)
    assert told == json.loads((tmp_path / "o" / REPORT_FILE).read_text())
    assert told["after"]["valid"] == (3 if code == 0 else 0)
    assert told["settings"]["image_size"] == 32
    assert (tmp_path / "o" / "before_after.png").is_file()


def test_an_earlier_report_does_not_stand_beside_new_pictures(
    tiny_pipe, make_adapter, tmp_path, monkeypatch
):
    path, out = make_adapter(), tmp_path / "out"
    evaluate_lora(path, pipe=tiny_pipe, output_folder=out, **QUICK)

    def interrupt(*args, **kwargs):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:  # while the first pictures are drawn
        patched.setattr(tiny_pipe.vae, "decode", interrupt)
        with pytest.raises(KeyboardInterrupt):
            evaluate_lora(path, pipe=tiny_pipe, output_folder=out, **QUICK)
    assert not (out / REPORT_FILE).exists()
    assert not getattr(tiny_pipe.unet, "peft_config", None)


def test_the_base_is_drawn_without_the_adapter(tiny_pipe, make_adapter, tokenizer_folder):
    from sdkit import generate

    report = evaluate_lora(make_adapter(), pipe=tiny_pipe, **QUICK)
    alone = generate(
        build_tiny_pipe(tokenizer_folder), list(PROMPTS), num_inference_steps=2, guidance_scale=2.0,
        batch_size=2, progress=False,
    )  # fmt: skip
    assert [i.pixels_sha256 for i in report.run_before.images] == [
        i.pixels_sha256 for i in alone.images
    ]


def test_an_adapter_that_changes_nothing_changes_nothing(tiny_pipe, make_adapter):
    report = evaluate_lora(
        make_adapter(size=0.0), pipe=tiny_pipe, kept_prompts=["on grass"], **QUICK
    )
    assert report.drift == 0
    assert report.before == report.after and report.kept_before == report.kept_after


def test_what_the_judge_does_not_know_is_none_and_said(tiny_pipe, make_adapter):
    report = evaluate_lora(make_adapter(), pipe=tiny_pipe, **QUICK)
    for group in (report.before, report.after, report.held_out):
        assert group.colour_right is group.kind_right is group.distance is None
        assert group.white_border is not None and group.diversity > 0
    assert report.kept_before is report.kept_after is report.drift is None
    text = str(report)
    assert "not judged" in text and "no drift" in text
    assert "before" in text and "held out" in text


def test_bad_pictures_are_counted_not_measured(tiny_pipe, make_adapter):
    report = evaluate_lora(make_adapter(size=1e20), pipe=tiny_pipe, **QUICK)
    assert (report.before.valid, report.after.valid) == (3, 0)
    assert report.after.white_border is None
    assert "after: 3 of 3 pictures are bad: 0 (nan)" in str(report)
    json.loads(report.to_json())


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_an_adapter_that_is_not_finite_is_refused(tiny_pipe, make_adapter, value):
    path = make_adapter()

    def spoil(weight):
        weight.view(-1)[0] = value
        return weight

    name = edit_weights(path, spoil)
    with pytest.raises(ValidationError, match=name.replace(".", r"\.")):
        evaluate_lora(path, pipe=tiny_pipe, **QUICK)


def test_an_adapter_of_another_base_is_refused(tiny_pipe, make_adapter):
    with pytest.raises(ValidationError, match="whose weights are not those of this pipeline"):
        evaluate_lora(make_adapter(seed=1), pipe=tiny_pipe, **QUICK)
    assert not getattr(tiny_pipe.unet, "peft_config", None)


def test_an_adapter_of_another_size_is_refused(make_adapter):
    with pytest.raises(ValidationError, match="this pipeline has"):
        evaluate_lora(make_adapter(), "mini", **QUICK)


def test_where_there_is_no_adapter_is_refused(tiny_pipe, tmp_path):
    with pytest.raises(ValidationError, match="no adapter there"):
        evaluate_lora(tmp_path / "gone.safetensors", pipe=tiny_pipe, **QUICK)
    (tmp_path / "checkpoint_00000002").mkdir()  # a run that was interrupted
    with pytest.raises(ValidationError, match="--resume"):
        evaluate_lora(tmp_path, pipe=tiny_pipe, **QUICK)
    garbage = tmp_path / "pytorch_lora_weights.safetensors"
    garbage.write_bytes(b"no adapter at all")
    with pytest.raises(ValidationError, match="cannot be read"):
        evaluate_lora(garbage, pipe=tiny_pipe, **QUICK)


def test_a_pipeline_with_an_adapter_is_refused(tiny_pipe, make_adapter):
    path = make_adapter()
    tiny_pipe.load_lora_weights(path.parent, weight_name=path.name)
    with pytest.raises(ValidationError, match="has an adapter already"):
        evaluate_lora(path, pipe=tiny_pipe, **QUICK)


@pytest.mark.parametrize("prompts", ["one string", ["one prompt"], []])
def test_too_few_prompts_are_refused(tiny_pipe, make_adapter, prompts):
    with pytest.raises(ValidationError, match="at least two"):
        evaluate_lora(make_adapter(), pipe=tiny_pipe, **{**QUICK, "prompts": prompts})


def test_an_error_on_the_way_takes_the_adapter_off(tiny_pipe, make_adapter):
    base = run_unet(tiny_pipe)
    with pytest.raises(ValidationError, match="num_inference_steps"):
        evaluate_lora(make_adapter(), pipe=tiny_pipe, **{**QUICK, "num_inference_steps": 0})
    assert torch.equal(run_unet(tiny_pipe), base)


def read_studio(split="validation"):
    items = list(render_studio_pictures(split, 64))
    pictures = [torch.from_numpy(image.copy()).permute(2, 0, 1) / 255 for _, image, _ in items]
    return pictures, [caption for _, _, caption in items]


def test_planted_pictures_are_told(monkeypatch):
    monkeypatch.setattr(
        "sdkit.finetuning.catalogue_source.STUDIO_COUNTS",
        {"train": 2, "validation": 24, "test": 24},
    )
    judge = load_classifier()
    pictures, captions = read_studio()
    others, _ = read_studio("test")
    held_out = torch.stack(others)
    good = measure_pictures(pictures, captions, judge, held_out)
    assert good.colour_right == good.kind_right == good.background_right == 1
    assert good.white_border > 0.99 and good.asked == good.valid == 24

    wrong = measure_pictures(pictures, captions[1:] + captions[:1], judge, held_out)
    assert wrong.colour_right < 0.5 and wrong.background_right == 1

    one = measure_pictures(pictures[:1] * 24, captions, judge, held_out)
    assert one.diversity < 0.01 * good.diversity  # collapse

    outdoors = [
        torch.from_numpy(np.array(image)).permute(2, 0, 1) / 255
        for image, _, _ in render_dataset(24, 3, ("grass",))
    ]
    away = measure_pictures(outdoors, captions, judge, held_out)
    assert away.white_border == 0 and away.background_right == 0
    # 24 against 24 pictures of one kind are 0.07 apart by chance; grass is 0.6 from white.
    assert away.distance > 5 * abs(good.distance)
    assert one.distance > 3 * abs(good.distance)


def test_the_bundled_model_is_judged_on_its_own_prompts(tmp_path, monkeypatch):
    for name in ("studio_prompts", "base_prompts"):
        few = getattr(evaluation_prompts, name)()[::8]
        monkeypatch.setattr(f"sdkit.finetuning.evaluation.{name}", lambda few=few: few)
    pipe, _ = load_pipeline("mini", dtype="float32", progress=False)
    path = write_adapter(pipe, tmp_path, size=0.0)
    report = evaluate_lora(path, num_inference_steps=1, progress=False)
    assert report.before.asked == report.kept_before.asked == 4
    assert 0 <= report.after.colour_right <= 1 and 0 <= report.kept_after.background_right <= 1
    assert report.after.distance is not None and report.kept_after.distance is None
    assert report.notes == ()
    assert report.model == "sdkit/mini"


def test_a_folder_of_photographs_is_not_judged_by_the_catalogue(tmp_path):
    pipe, _ = load_pipeline("mini", dtype="float32", progress=False)
    path = write_adapter(pipe, tmp_path, size=0.0)
    folder = tmp_path / "photographs" / "validation"
    folder.mkdir(parents=True)
    for index, (image, caption, _) in enumerate(render_dataset(4, 1)):
        image.save(folder / f"{index}.png")
        (folder / f"{index}.txt").write_text(caption)
    (tmp_path / "photographs" / "train").mkdir()
    dataset = ImageCaptionDataset(
        tmp_path / "photographs", split="validation", resolution=128, progress=False
    )
    report = evaluate_lora(
        path, dataset=tmp_path / "photographs", num_inference_steps=1, progress=False,
        kept_prompts=["red boots on grass"],
    )  # fmt: skip
    assert report.settings["prompts"] == list(dict.fromkeys(dataset.captions))
    assert report.after.colour_right is report.after.distance is None
    assert report.kept_after.colour_right is not None  # drawings of the base, still
    assert "rendered catalogue alone" in str(report)

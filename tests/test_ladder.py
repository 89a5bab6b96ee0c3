"""The ladder climbed on failures of different causes, undone each time; `sdkit fix` on top."""

import json
import shutil

import pytest
import torch
from PIL import Image
from test_plan import scale_inside
from typer.testing import CliRunner

from sdkit import load_pipeline
from sdkit.cli import app
from sdkit.emulate import mps
from sdkit.loading.recipe import Recipe
from sdkit.precision.fixing import fix_model
from sdkit.precision.ladder import climb
from sdkit.validation import ValidationError

FAST = {"num_inference_steps": 2, "progress": False}


def by_name(rungs):
    return {rung.name: rung for rung in rungs}


def state(pipe):
    return [
        (name, p.dtype, p.data_ptr(), sorted(vars(pipe.unet)))
        for name, p in pipe.unet.named_parameters()
    ] + [type(processor).__name__ for processor in pipe.unet.attn_processors.values()]


def test_an_overflow_is_cured_by_less_than_float32(tiny_pipe):
    scale_inside(tiny_pipe.unet, "mid_block.resnets.0", 17)
    before = state(tiny_pipe)
    rungs = by_name(climb(tiny_pipe, "a shoe", **FAST))
    assert state(tiny_pipe) == before
    assert rungs["float16 as it is"].valid == 0 and rungs["float16, VAE float32"].valid == 0
    for name in ("rebalanced float16", "planned float16"):
        assert rungs[name].is_proven and rungs[name].psnr_db > 50 and rungs[name].ssim > 0.99
        assert rungs[name].weight_bytes <= 0.55 * rungs["float32"].weight_bytes
    assert rungs["float16, rescued"].is_proven and "unet" in rungs["float16, rescued"].note
    assert "float16, SDPA" not in rungs  # attention is safe already


def test_stale_memory_is_cured_by_attention_and_not_by_float32(tiny_pipe):
    tiny_pipe.enable_attention_slicing("max")
    before = state(tiny_pipe)
    with mps(memory="nan"):
        rungs = by_name(climb(tiny_pipe, "a shoe", **FAST))
    assert state(tiny_pipe) == before
    cures = {name for name, rung in rungs.items() if rung.valid == rung.count}
    assert cures == {"newer torch (emulated)", "float16, SDPA", "float16, safe slicing"}
    assert "precision is not the cause" in rungs["planned float16"].note
    assert all(rung.seconds is None for rung in rungs.values())


def test_it_stops_at_the_first_rung_that_cures(tiny_pipe):
    rungs = climb(tiny_pipe, "a shoe", stop_when_proven=True, **FAST)
    assert [rung.name for rung in rungs] == ["float16 as it is"]


def test_a_bad_reference_is_told(tiny_pipe):
    with torch.no_grad():
        tiny_pipe.unet.conv_in.weight[0] = float("nan")
    with pytest.raises(ValidationError, match="float32 gives NaN"):
        climb(tiny_pipe, "a shoe", **FAST)


def fix(folder, *options):
    arguments = ["fix", str(folder), "a shoe", "--steps", "2", "--backend", "cpu"]
    return CliRunner().invoke(app, [*arguments, *map(str, options)])


def test_fix_writes_what_it_takes(tiny_pipe, tmp_path):
    with torch.no_grad():  # weights of an honest size, an inner stream that float16 cannot hold
        for name in ("conv1", "time_emb_proj"):
            layer = getattr(tiny_pipe.unet.mid_block.resnets[0], name)
            layer.weight *= 2.0**14
            layer.bias.add_(1).mul_(2.0**15)
    tiny_pipe.save_pretrained(tmp_path / "model")
    result = fix(tmp_path / "model", "--output", tmp_path / "fix")
    assert result.exit_code == 0, result.output
    assert "do this:" in result.stdout
    content = json.loads((tmp_path / "fix" / "fix.json").read_text())
    assert content["rungs"][0]["valid"] == "0 of 1" and content["chosen"] != "float32"
    assert Image.open(tmp_path / "fix" / "before_after.png").width > 100
    if (tmp_path / "fix" / "recipe.json").exists():
        recipe = Recipe.load(tmp_path / "fix" / "recipe.json")
        load_pipeline(tmp_path / "model", backend="cpu", recipe=recipe, progress=False)


def test_fix_says_sdpa_where_memory_is_the_cause(tiny_folder, tmp_path):
    options = ("--attention", "diffusers-sliced", "--memory", "nan", "--emulate")
    result = fix(tiny_folder, *options, "baddbmm-beta-zero", "--output", tmp_path)
    assert result.exit_code == 0 and "do this: pip install -U 'torch>=2.14'" in result.stdout


def test_fix_with_nothing_to_fix_says_so(tiny_folder, tmp_path):
    result = fix(tiny_folder, "--output", tmp_path, "--json")
    assert result.exit_code == 0
    assert json.loads(result.stdout)["chosen"] == "float16 as it is"


def test_fix_says_what_is_emulated_and_leaves_nothing_of_an_earlier_model(tiny_folder, tmp_path):
    assert fix(tiny_folder, "--output", tmp_path).exit_code == 0
    (tmp_path / "recipe.json").write_text("{}")
    (tmp_path / "model").mkdir()
    (tmp_path / "notes.txt").write_text("mine")
    result = fix(tiny_folder, "--output", tmp_path)
    assert "emulated float16 arithmetic" in result.stdout
    assert "emulated float16" in json.loads((tmp_path / "fix.json").read_text())["emulated"]
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "before_after.png", "fix.json", "notes.txt",
    ]  # fmt: skip


def test_what_a_fix_left_that_was_killed_is_not_taken_for_the_next_one_s(
    tiny_folder, tmp_path, monkeypatch
):
    def interrupt(*args, **kwargs):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:  # between the recipe and the end
        patched.setattr("sdkit.precision.fixing.save_figure", interrupt)
        assert fix(tiny_folder, "--output", tmp_path).exit_code == 130
    assert not (tmp_path / "fix.json").exists()
    (tmp_path / "recipe.json").write_text("{}")
    assert fix(tiny_folder, "--output", tmp_path).exit_code == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["before_after.png", "fix.json"]


def test_fix_cures_no_model_that_float32_cannot_hold(tiny_pipe, tmp_path):
    with torch.no_grad():
        tiny_pipe.unet.conv_in.weight.fill_(1e38)
    tiny_pipe.save_pretrained(tmp_path / "model")
    result = fix(tmp_path / "model", "--output", tmp_path / "fix")
    assert result.exit_code == 1 and result.stdout == ""
    assert "float32 gives NaN" in result.stderr
    assert not list((tmp_path / "fix").iterdir())
    told = fix(tmp_path / "model", "--output", tmp_path / "fix", "--json")
    assert told.exit_code == 1 and "float32 gives NaN" in json.loads(told.stdout)["error"]
    assert "float32 gives NaN" in told.stderr


def test_fix_refuses_a_folder_that_it_cannot_write_before_it_draws(tiny_folder, tmp_path):
    (tmp_path / "file").touch()
    result = fix(tiny_folder, "--output", tmp_path / "file" / "fix")
    assert result.exit_code == 2 and "cannot be written to" in result.stderr


def test_fix_does_not_clear_away_the_model_that_it_is_asked_about(tiny_folder, tmp_path):
    shutil.copytree(tiny_folder, tmp_path / "model")
    (tmp_path / "fix.json").write_text("{}")
    with pytest.raises(ValidationError, match="is what an earlier fix left"):
        fix_model(tmp_path / "model", "a shoe", tmp_path, num_inference_steps=1, progress=False)
    assert (tmp_path / "model" / "model_index.json").exists()


def test_fix_of_nothing_is_one_clear_error(tmp_path):
    result = fix(tmp_path / "nowhere", "--output", tmp_path)
    assert result.exit_code == 2 and "Traceback" not in result.output

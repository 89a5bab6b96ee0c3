"""`sdkit train` as it is typed: settings from a file and options, errors in a line, exit codes."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from diffusers import AutoencoderKL
from PIL import Image
from typer.testing import CliRunner

from sdkit import LoRAConfig
from sdkit.cli import app
from sdkit.finetuning.dataset_report import DatasetReport


def run(*arguments):
    return CliRunner().invoke(app, ["train", *map(str, arguments)])


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """Ten pictures of noise with captions."""
    folder = tmp_path_factory.mktemp("photos")
    noise = np.random.default_rng(0)
    for split, count in (("train", 8), ("validation", 2)):
        (folder / split).mkdir()
        for i in range(count):
            pixels = noise.integers(0, 255, (64, 64, 3), np.uint8)
            Image.fromarray(pixels).save(folder / split / f"{i}.png")
            (folder / split / f"{i}.txt").write_text(f"noise of {split}")
    return folder


@pytest.fixture(scope="module")
def settings(tiny_folder, photos, tmp_path_factory):
    """A file of settings for a short training of the tiny model."""
    path = tmp_path_factory.mktemp("settings") / "config.yaml"
    config = LoRAConfig(
        model=str(tiny_folder), dataset=str(photos), backend="cpu", max_train_steps=2,
        validation_steps=2, cache_folder=str(path.with_name("cache")),
    )  # fmt: skip
    return config.save(path)


def test_a_file_and_options_then_again_then_resume(settings, tmp_path):
    folder = tmp_path / "run"
    result = run(settings, "--output-folder", folder, "--rank", 2, "--json")
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    assert report["settings"]["rank"] == 2 and report["steps_done"] == 2
    assert Path(report["adapter_path"]).is_file()
    found = DatasetReport.from_json((folder / "dataset_train.json").read_text())
    assert len(found.files) == 8 and found.split == "train"
    again = run(settings, "--output-folder", folder)
    assert again.exit_code == 2 and "a training is there already" in again.output
    resumed = run("--resume", folder, "--json")
    assert resumed.exit_code == 0
    assert json.loads(resumed.stdout)["losses"] == report["losses"]


def test_every_setting_is_an_option():
    text = " ".join(run("--help").stdout.split())
    for field in dataclasses.fields(LoRAConfig):
        assert f"--{field.name.replace('_', '-')}" in text


def test_an_option_of_several_texts_is_given_several_times(settings, tmp_path):
    options = ("--kept-prompts", "a cat", "--kept-prompts", "", "--validation-inference-steps", 1)
    result = run(settings, "--output-folder", tmp_path / "run", "--json", *options)
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["settings"]["kept_prompts"] == ["a cat", ""]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--rank", 0], "rank='0': expected a whole number from 1 on"),
        (["--learning-rate", -1], "learning_rate='-1': expected a number above 0"),
        (["missing.yaml"], "missing.yaml: cannot be read"),
        (["--resume", "nowhere"], "nowhere: no training to resume there"),
        (["--resume", ".", "--overwrite"], "overwrite was given beside it"),
        (["--resume", "nowhere", "--rank", 4], "rank was given beside it"),
        (["--mixed-precision", "fp16", "--backend", "cpu"], "far slower than float32"),
        (["--use-8bit-adam", "--backend", "cpu"], "use_8bit_adam on cpu"),
        (["--report-to", "nosuch", "--backend", "cpu"], "report_to='nosuch'"),
        (["--dataset", "nowhere", "--backend", "cpu"], "nowhere"),
        (["--model", "nowhere/at/all", "--backend", "cpu"], "nowhere/at/all"),
    ],
)
def test_errors_are_one_line(arguments, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = run(*arguments)
    assert result.exit_code == 2
    last = result.output.strip().splitlines()[-1]
    assert message in last and "Traceback" not in result.output
    assert not list(tmp_path.rglob("config.yaml"))


def test_an_empty_and_a_too_small_dataset(settings, tmp_path):
    (tmp_path / "empty").mkdir()
    result = run(settings, "--dataset", tmp_path / "empty", "--output-folder", tmp_path / "run")
    assert result.exit_code == 2 and "empty" in result.output.splitlines()[-1]
    result = run(settings, "--resolution", 128, "--output-folder", tmp_path / "run")
    assert result.exit_code == 2 and "0 of 8 images can be used" in result.output


def test_ctrl_c_while_images_are_encoded(settings, tmp_path, monkeypatch):
    def interrupt(*args, **kwargs):
        raise KeyboardInterrupt

    folder = tmp_path / "run"
    with monkeypatch.context() as patched:  # a hook of the real encoder, where Ctrl-C would come
        patched.setattr(AutoencoderKL, "encode", interrupt)
        options = ("--output-folder", folder, "--cache-folder", tmp_path / "cache")
        result = run(settings, *options)
    assert result.exit_code == 130
    assert "the same command goes on where the encoding was" in result.output
    assert run(settings, *options).exit_code == 0


def test_ctrl_c_in_a_shell(settings, tmp_path):
    folder = tmp_path / "run"
    process = subprocess.Popen(
        [
            sys.executable, "-m", "sdkit.finetuning.train", str(settings),
            "--output-folder", str(folder), "--max-train-steps", "5000",
            "--checkpointing-steps", "1",
        ],
        stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
        env={**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    waited = time.monotonic()
    first = folder / "checkpoints" / "step_00000001"
    while not first.exists() and time.monotonic() - waited < 120:
        time.sleep(0.2)
    process.send_signal(signal.SIGINT)
    printed, _ = process.communicate(timeout=60)
    assert process.returncode == 130
    assert f"resume      sdkit train --resume {folder}" in printed
    assert run("--resume", folder, "--rank", 4).exit_code == 2  # and leaves it as it is

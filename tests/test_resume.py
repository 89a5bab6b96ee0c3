"""Resume is exact: killed, interrupted or out of disk, a run ends bit for bit as it would have."""

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tiny_images import make_splits
from tiny_pipelines import build_tiny_pipe
from tiny_training import make_config, make_data, make_encoded

from sdkit.finetuning.checkpoints import list_checkpoints, load_checkpoint
from sdkit.finetuning.config import LoRAConfig
from sdkit.finetuning.report import REPORT_FILE
from sdkit.finetuning.run_start import CONFIG_FILE
from sdkit.finetuning.training import train_lora
from sdkit.validation import ValidationError

SCRIPT = Path(__file__).with_name("interrupted_training.py")
ADAPTER = "pytorch_lora_weights.safetensors"


@pytest.fixture(scope="module")
def runs(tokenizer_folder, tmp_path_factory):
    """The folder of all runs of the script, and what each try came to."""
    folder = tmp_path_factory.mktemp("runs")
    printed = subprocess.run(
        [sys.executable, str(SCRIPT), str(tokenizer_folder), str(folder), "1"],
        capture_output=True, text=True, timeout=300, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert printed.returncode == 0, printed.stderr[-2000:]
    tries = {}
    for line in printed.stdout.splitlines():
        result = json.loads(line)
        tries.setdefault(result["name"], []).append(result)
    return folder, tries


@pytest.mark.parametrize(
    ("name", "least_kills"),
    [("killed_in_saves", 3), ("killed_any_time", 1), ("interrupted", 0), ("disk_full", 0)],
)
def test_the_end_is_that_of_the_uninterrupted_run(runs, name, least_kills):
    folder, tries = runs
    assert sum(result["killed"] for result in tries[name]) >= least_kills
    assert len(tries[name]) > 1
    assert tries[name][-1]["stopped"] == "finished"
    assert tries[name][-1]["losses"] == tries["whole"][0]["losses"]
    assert (folder / name / ADAPTER).read_bytes() == (folder / "whole" / ADAPTER).read_bytes()
    ends = [load_checkpoint(list_checkpoints(folder / run)[-1]) for run in (name, "whole")]
    for (_, state), (_, other) in zip(*(end[2]["state"].items() for end in ends), strict=True):
        assert all((state[key] == other[key]).all() for key in state)


def test_nothing_half_written_is_left(runs):
    folder, _ = runs
    for name in ("killed_in_saves", "disk_full"):
        assert len(list_checkpoints(folder / name)) == 2
        assert not list(folder.rglob("*.partial")) and not list(folder.rglob("*.part"))


def test_ctrl_c_saves_and_says_how_to_resume(runs):
    folder, tries = runs
    first = tries["interrupted"][0]
    assert (first["stopped"], len(first["losses"])) == ("interrupted", 3)
    assert not first["killed"]
    report = json.loads((folder / "interrupted" / REPORT_FILE).read_text())
    assert report["stopped"] == "finished"  # of the second try


def test_a_full_disk_leaves_the_last_good_checkpoint(runs):
    folder, tries = runs
    error = tries["disk_full"][0]["error"]
    assert "step_00000004: cannot be written (File too large)" in error
    assert "The last good checkpoint is" in error and "step_00000003" in error
    assert error.endswith(f"sdkit train --resume {folder / 'disk_full'}.")


@pytest.fixture
def finished(tiny_pipe, tmp_path):
    """A finished short run, with checkpoints of steps 0, 2 and 4."""
    config = make_config(tmp_path / "run", max_train_steps=4, validation_steps=None)
    train_lora(config, pipe=tiny_pipe, data=make_data(tiny_pipe), progress=False)
    return config


def resume(config, tokenizer_folder, data=None, seed=0):
    pipe = build_tiny_pipe(tokenizer_folder, seed=seed)
    data = data or make_data(pipe)
    return train_lora(config, pipe=pipe, data=data, resume=True, progress=False)


@pytest.mark.parametrize("file", ["optimizer.pt", ADAPTER, "checkpoint.json"])
@pytest.mark.parametrize("damage", ["flip", "cut", "empty", "remove"])
def test_a_damaged_checkpoint_is_an_error(finished, tokenizer_folder, file, damage):
    path = list_checkpoints(finished.output_folder)[-1] / file
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    if damage == "remove":
        path.unlink()
    else:
        path.write_bytes({"flip": content, "cut": content[:-9], "empty": b""}[damage])
    with pytest.raises(ValidationError, match="Remove the folder .* to resume from step_00000002"):
        resume(finished, tokenizer_folder)
    shutil.rmtree(path.parent)
    assert resume(finished, tokenizer_folder).steps_done == 4


def test_dropout_resumes_exactly(tokenizer_folder, tmp_path):
    """It draws from torch's own generators, which others draw from as well."""

    def run(name, stop_after=None, **options):
        pipe = build_tiny_pipe(tokenizer_folder)
        for layer in pipe.unet.modules():
            if isinstance(layer, torch.nn.Dropout):
                layer.p = 0.2
        config = make_config(
            tmp_path / name,
            max_train_steps=4,
            checkpointing_steps=1,
            validation_steps=None,
            gradient_accumulation_steps=2,
        )

        def watch(record):
            if record.step == stop_after:
                os.kill(os.getpid(), signal.SIGINT)
            torch.rand(record.step + 1)  # of whoever watches: it has no say

        return train_lora(
            config, pipe=pipe, data=make_data(pipe), progress=False, on_step=watch, **options
        )

    whole = run("whole")
    torch.manual_seed(5)
    assert run("cut", stop_after=1).stopped == "interrupted"
    torch.manual_seed(6)
    assert run("cut", resume=True).losses == whole.losses
    ends = [(tmp_path / name / ADAPTER).read_bytes() for name in ("whole", "cut")]
    assert ends[0] == ends[1]


def test_copies_of_a_checkpoint_are_left_alone(tiny_pipe, tmp_path):
    names = ("step_00000099.backup", "step_00000001 (copy)", "step_latest")
    for name in names:
        (tmp_path / "run" / "checkpoints" / name).mkdir(parents=True)
    config = make_config(
        tmp_path / "run", max_train_steps=3, checkpointing_steps=1, checkpoints_total_limit=1,
        validation_steps=None, gradient_accumulation_steps=1,
    )  # fmt: skip
    train_lora(config, pipe=tiny_pipe, data=make_data(tiny_pipe), progress=False)
    found = sorted(path.name for path in (tmp_path / "run" / "checkpoints").iterdir())
    assert found == sorted([*names, "step_00000003"])


def test_a_checkpoint_of_another_run_is_refused(finished, tokenizer_folder, tmp_path):
    other = finished.replace(output_folder=tmp_path / "other", learning_rate=2e-3)
    pipe = build_tiny_pipe(tokenizer_folder)
    train_lora(other, pipe=pipe, data=make_data(pipe), progress=False)
    last = list_checkpoints(finished.output_folder)[-1]
    shutil.rmtree(last)
    shutil.copytree(list_checkpoints(other.output_folder)[-1], last)
    with pytest.raises(ValidationError, match=r"was made with learning_rate=0\.002, and the run"):
        resume(finished, tokenizer_folder)


def test_settings_that_were_edited_in_the_run_s_folder_are_seen(finished, tokenizer_folder):
    path = Path(finished.output_folder) / CONFIG_FILE
    path.write_text(path.read_text().replace("max_train_steps: 4", "max_train_steps: 9"))
    with pytest.raises(ValidationError, match="was made with max_train_steps=4, and the run has 9"):
        resume(LoRAConfig.load(path), tokenizer_folder)


def test_no_checkpoint_is_an_error(finished, tokenizer_folder, tmp_path):
    shutil.rmtree(Path(finished.output_folder) / "checkpoints")
    with pytest.raises(ValidationError, match="no checkpoint there"):
        resume(finished, tokenizer_folder)
    with pytest.raises(ValidationError, match="no training to resume there"):
        resume(make_config(tmp_path / "other"), tokenizer_folder)


def test_other_settings_data_or_weights_are_refused(finished, tokenizer_folder):
    with pytest.raises(ValidationError, match=r"rank=4: the run was begun with 8"):
        resume(finished.replace(rank=4), tokenizer_folder)
    pipe = build_tiny_pipe(tokenizer_folder)
    with pytest.raises(ValidationError, match="begun with other train images"):
        resume(finished, tokenizer_folder, (make_encoded(pipe, seed=7), make_data(pipe)[1]))
    with pytest.raises(ValidationError, match="begun with other weights of the base model"):
        resume(finished, tokenizer_folder, seed=3)


def test_a_run_is_not_overwritten_unless_asked(finished, tiny_pipe, tokenizer_folder):
    pipe = build_tiny_pipe(tokenizer_folder)
    options = {"pipe": pipe, "data": make_data(pipe), "progress": False}
    before = (Path(finished.output_folder) / ADAPTER).read_bytes()
    with pytest.raises(ValidationError, match="a training is there already"):
        train_lora(finished, **options)
    with pytest.raises(ValidationError, match="to be resumed and overwritten"):
        train_lora(finished, resume=True, overwrite=True, **options)
    assert (Path(finished.output_folder) / ADAPTER).read_bytes() == before
    changed = finished.replace(seed=1, max_train_steps=2)
    assert train_lora(changed, overwrite=True, **options).steps_done == 2
    assert (Path(finished.output_folder) / ADAPTER).read_bytes() != before


def test_other_files_in_the_folder_stay(tiny_pipe, tmp_path):
    for name in ("images/a.png", "checkpoints/mine.txt", "notes.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("mine")
    config = make_config(tmp_path, max_train_steps=2, validation_steps=None)
    train_lora(config, pipe=tiny_pipe, data=make_data(tiny_pipe), progress=False)
    assert len(list(tmp_path.rglob("*.txt")) + list(tmp_path.rglob("*.png"))) == 3


def test_a_folder_that_cannot_be_made(tiny_pipe, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValidationError, match="file/run: cannot be written to"):
        train_lora(
            make_config(tmp_path / "file" / "run"), pipe=tiny_pipe, data=make_data(tiny_pipe),
            progress=False,
        )  # fmt: skip


def test_a_disk_that_is_full_before_the_first_checkpoint(tiny_pipe, tmp_path):
    photos = make_splits(tmp_path / "photos", size=(64, 64))
    config = make_config(tmp_path / "run", dataset=str(photos), resolution=64)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100, limits[1]))
        with pytest.raises(ValidationError, match="run: cannot be used .File too large"):
            train_lora(config, pipe=tiny_pipe, progress=False)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert not [path for path in tmp_path.rglob("*") if path.suffix in (".part", ".partial")]


@pytest.mark.skipif(os.geteuid() != 0, reason="another user cannot be taken on")
def test_a_run_that_cannot_be_written_to_is_not_resumed(finished, tokenizer_folder):
    folder = Path(finished.output_folder)
    pipe = build_tiny_pipe(tokenizer_folder)
    data = make_data(pipe)
    for path in (folder, *folder.parents):
        if path.stat().st_mode & 0o005 != 0o005:
            path.chmod(0o755)  # of pytest's own folders, which are root's alone
    try:
        os.seteuid(65534)
        with pytest.raises(ValidationError, match="run: cannot be written to"):
            train_lora(finished, pipe=pipe, data=data, resume=True, progress=False)
    finally:
        os.seteuid(0)

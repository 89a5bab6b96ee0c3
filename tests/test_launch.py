"""Two processes do what one does: the same steps, the same drop, the same weights but rounded."""

import json
import os
import subprocess
import sys

import launched_training
import pytest
import safetensors.torch
import torch


def launch_two(tokenizer_folder, folder):
    # Of accelerate's launchers only that of --multi_gpu starts several processes, on CPUs too.
    subprocess.run(
        [
            sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu",
            "--num_processes", "2", "--num_machines", "1", "--main_process_port", "0",
            "--mixed_precision", "no", "--dynamo_backend", "no",
            launched_training.__file__, str(tokenizer_folder), str(folder),
        ],
        check=True, timeout=300, capture_output=True, text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip


def read_run(folder):
    report = json.loads((folder / "train_report.json").read_text())
    return report, safetensors.torch.load_file(folder / "pytorch_lora_weights.safetensors")


def test_two_processes_train_as_one(tokenizer_folder, tmp_path):
    launched_training.train(tokenizer_folder, tmp_path / "1")
    launch_two(tokenizer_folder, tmp_path / "2")
    (one, weights), (two, shared) = read_run(tmp_path / "1"), read_run(tmp_path / "2")
    assert (one["processes"], two["processes"]) == (1, 2)
    for key in ("losses", "validation_losses"):
        assert [step for step, _ in two[key]] == [step for step, _ in one[key]]
        found, expected = ([loss for _, loss in report[key]] for report in (two, one))
        assert found == pytest.approx(expected, rel=1e-5)
    assert two["excluded_images"] == one["excluded_images"] == ["image_005.png"]
    (dropped,), (expected,) = two["dropped_steps"], one["dropped_steps"]
    assert dropped == expected
    for name, value in weights.items():
        # AdamW divides by the size of the gradient: where that is rounding, so is the update.
        assert torch.allclose(shared[name], value, rtol=1e-3, atol=1e-5), name

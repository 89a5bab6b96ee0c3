"""The notebooks run through papermill, take the promised parameters, are stored without outputs."""

import json
from pathlib import Path

import nbformat
import papermill
import pytest

from sdkit import LoRAConfig
from sdkit.batch.parameters import read_parameters
from sdkit.demo import find_notebooks, format_table, run_demo

NOTEBOOKS = find_notebooks()
PARAMETERS = {
    "model", "backend", "dtype", "attention", "prompts", "seed", "num_inference_steps",
    "guidance_scale", "image_size", "output_folder",
}  # fmt: skip
OTHER_PARAMETERS = {
    "02_fix_precision": PARAMETERS | {"failures"},
    "03_train_lora": PARAMETERS - {"dtype", "attention"}
    | {
        "dataset",
        "targets",
        "rank",
        "alpha",
        "learning_rate",
        "max_train_steps",
        "train_batch_size",
        "gradient_accumulation_steps",
        "noise_offset",
        "timestep_bias",
        "velocity_weight",
        "kept_prompts",
        "kept_share",
        "pictures",
    },
    "04_compare_runs": PARAMETERS - {"dtype", "attention"} | {"sweep_folder", "jobs"},
}
SMALL = {
    "num_inference_steps": 1, "image_size": 64,
    "failures": ["stale memory", "UNet overflow"],  # of 02 alone; the others: test_failures.py
    "max_train_steps": 3, "train_batch_size": 1, "pictures": 2,  # of 03 alone
}  # fmt: skip


def test_there_are_notebooks():
    assert [path.stem for path in NOTEBOOKS] == [
        "01_diagnose_black_images",
        "02_fix_precision",
        "03_train_lora",
        "04_compare_runs",
    ]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_parameters_are_the_promised_ones(path):
    expected = OTHER_PARAMETERS.get(path.stem, PARAMETERS)
    assert set(papermill.inspect_notebook(path)) == expected


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_stored_form(path):
    notebook = nbformat.read(path, as_version=4)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert code[0].metadata.tags == ["parameters"]
    assert code[-1].metadata.tags == ["check"]
    assert not any(cell.outputs or cell.execution_count for cell in code)
    assert "papermill" not in notebook.metadata
    forbidden = ("%pip", "\n!", '"cuda")', "/home/", "/Users/")
    assert not [word for cell in code for word in forbidden if word in cell.source]


def test_the_notebook_and_the_light_one_train_as_the_preset_does():
    preset = LoRAConfig.load("studio_white").to_dict()
    for folder, name in (("notebooks", "03_train_lora"), ("sdkit/grids", "train_adapter")):
        path = Path(__file__).parent.parent / folder / f"{name}.ipynb"
        parameters = read_parameters(nbformat.read(path, as_version=4), name)
        shared = (parameters.keys() & preset.keys()) - {"output_folder"}
        assert len(shared) >= 12
        assert {key: parameters[key].default for key in shared} == {k: preset[k] for k in shared}


@pytest.mark.notebook
def test_demo_runs_the_notebooks_and_tells_the_story(tmp_path):
    runs = run_demo(tmp_path, parameters=SMALL)
    assert [run.error for run in runs] == [None] * len(NOTEBOOKS)
    assert all(run.is_good for run in runs)
    table = format_table(runs)
    assert "3 of 3 pictures are bad" in table
    assert "unet, step 0" in table
    assert "0 of 3 saved" in table
    page = (tmp_path / "index.html").read_text()
    assert page.count("data:image/png") >= 3
    for run in runs:
        assert (tmp_path / f"{run.name}.ipynb").exists()
        assert (tmp_path / f"{run.name}.html").exists()
    assert "to the last bit" in table and "the same first losses" in table
    record = json.loads((tmp_path / "02_fix_precision" / "reference" / "record.json").read_text())
    assert record["complete"] is True
    assert not list(tmp_path.glob("*.partial"))


SDPA, FLOAT32 = {"attention": "sdpa"}, {"dtype": "float32"}


@pytest.mark.slow
@pytest.mark.notebook
@pytest.mark.parametrize("choice", [SDPA, FLOAT32, SDPA | FLOAT32], ids=str)
def test_other_documented_choices_run_through_too(tmp_path, choice):
    one_prompt = {"num_inference_steps": 2, "image_size": 64, "prompts": ["red boots on grass"]}
    runs = run_demo(tmp_path, parameters=one_prompt | choice, notebooks=NOTEBOOKS[:2])
    assert [run.error for run in runs] == [None, None]
    assert all(run.is_good for run in runs)
    assert "0 of 1 pictures are bad" in format_table(runs)


@pytest.mark.notebook
def test_a_failed_notebook_leaves_nothing_that_looks_done(tmp_path):
    (run,) = run_demo(tmp_path, parameters=SMALL | {"dtype": "float17"}, notebooks=NOTEBOOKS[:1])
    assert not run.is_good
    assert "float17" in run.error
    assert not (tmp_path / "01_diagnose_black_images").exists()
    assert not (tmp_path / "01_diagnose_black_images.ipynb").exists()
    assert (tmp_path / "01_diagnose_black_images.failed.ipynb").exists()
    assert "float17" in (tmp_path / "index.html").read_text()

"""Grid against notebook, before any kernel: names, types, what a loader refuses, and run ids."""

from pathlib import Path

import nbformat
import pytest
from sweep_notebooks import write_notebook

import sdkit
from sdkit.batch.plan import find_packages, make_plan
from sdkit.validation import ValidationError

ROOT = Path(__file__).parent.parent
GRIDS = sorted((ROOT / "sdkit" / "grids").glob("*.yaml"))
PARAMETERS = """
steps: int = 25  # a comment
rate: float = 1e-4
name: str | None = None
sizes: list[int] = [1, 2]
mode: "Literal['a', 'b']" = "a"
flag: bool = False
text = "a = b"
dtype: str = "float16"
backend: str = "auto"
settings: dict = {}
marks = {b"no", "JSON"}
model: str = "mini"
attention: str = "sdpa"
output_folder: str = "runs/x"
"""


@pytest.fixture
def notebook(tmp_path):
    return write_notebook(tmp_path / "n.ipynb", PARAMETERS, "import torch", "print(steps)")


def plan_of(notebook, **fixed):
    return make_plan(notebook, {"fixed": fixed})


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("steps", 3), ("rate", 2), ("rate", 0.5), ("name", "x"), ("name", None), ("sizes", [3]),
        ("mode", "b"), ("flag", True), ("text", "x"), ("dtype", "auto"), ("attention", "sliced"),
        ("backend", "cpu"), ("model", "mini"),
    ],
    ids=str,
)  # fmt: skip
def test_values_of_the_right_type_pass(notebook, name, value):
    (run,) = plan_of(notebook, **{name: value}).runs
    assert run.values == {name: value}


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("stesp", 3, "'stesp' is no parameter of the notebook. Did you mean steps?"),
        ("steps", "3", "steps is '3' (str), expected int"),
        ("steps", 2.5, "expected int"),
        ("steps", True, "expected int"),
        ("steps", None, "expected int"),
        ("rate", "fast", "expected float"),
        ("rate", True, "expected float"),
        ("name", 3, "expected str | None"),
        ("sizes", [1, "2"], "expected list[int]"),
        ("sizes", 3, "expected list[int]"),
        ("mode", "c", "expected Literal"),
        ("flag", 1, "expected bool"),
        ("text", 3, "expected str"),
        ("output_folder", "x", "is set for each run by the sweep"),
        ("dtype", "float17", "dtype='float17'"),
        ("backend", "gpu", "backend='gpu'"),
        ("attention", "slice", "attention='slice'"),
        ("model", "./nothing", "no such file or folder"),
        ("settings", {1: 2}, "maps (with text as keys)"),  # papermill would hand on {"1": 2}
        ("settings", {"a": [{2, 3}]}, "settings is {'a': [{2, 3}]} (dict), expected numbers"),
    ],
    ids=str,
)
def test_wrong_names_types_and_what_a_loader_refuses(notebook, name, value, message):
    with pytest.raises(ValidationError) as refused:
        plan_of(notebook, **{name: value})
    assert message in str(refused.value)


def test_an_annotation_in_words_takes_all(tmp_path):
    path = write_notebook(tmp_path / "n.ipynb", "x: 'a share, in [0, 1]' = 0.5\ny: '' = 1", "1")
    (run,) = plan_of(path, x="all", y=2).runs
    assert run.values == {"x": "all", "y": 2}


TRAINING = """
rank: int = 8
learning_rate: float = 1e-4
targets: list = ["attention"]
max_train_steps: int = 100
lr_warmup_steps: int = 5
image_size: int = 0
output_folder: str = "runs/x"
"""


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("rank", 0, "rank=0: expected a whole number from 1 on"),
        ("learning_rate", -1.0, "learning_rate=-1.0: expected a number above 0"),
        ("learning_rate", float("nan"), "learning_rate=nan"),
        ("targets", ["atention"], "expected one or more of attention"),
        ("max_train_steps", 5, "lr_warmup_steps=5: expected fewer than max_train_steps=5"),
    ],
    ids=str,
)
def test_settings_that_a_training_refuses(tmp_path, name, value, message):
    training = write_notebook(tmp_path / "t.ipynb", TRAINING, "from sdkit import LoRAConfig")
    with pytest.raises(ValidationError) as refused:
        plan_of(training, **{name: value})
    assert str(refused.value).startswith("grid: ") and message in str(refused.value)
    other = write_notebook(tmp_path / "o.ipynb", TRAINING, "print(rank)")  # a word of its own
    assert plan_of(other, **{name: value}).runs


def test_a_refused_setting_names_its_line(tmp_path):
    training = write_notebook(tmp_path / "t.ipynb", TRAINING, "from sdkit import LoRAConfig")
    path = tmp_path / "g.yaml"
    path.write_text("grid:\n  learning_rate: [1e-4]\n  rank: [4, 0]\n")
    with pytest.raises(ValidationError, match="g.yaml, line 3: rank=0"):
        make_plan(training, path)


def test_a_refusal_names_the_line_of_the_grid(notebook, tmp_path):
    path = tmp_path / "g.yaml"
    path.write_text("grid:\n  steps: [1, 2]\n  rat: [0.5]\n")
    with pytest.raises(ValidationError, match=r"g.yaml, line 3: 'rat' is no parameter.*rate"):
        make_plan(notebook, path)


def test_a_whole_number_for_a_float_reaches_the_notebook_as_one(notebook):
    (run,) = plan_of(notebook, rate=2).runs
    assert type(run.values["rate"]) is float
    assert run.run_id == plan_of(notebook, rate=2.0).runs[0].run_id


def test_the_id_is_of_source_parameters_and_version(notebook, tmp_path, monkeypatch):
    run_id = plan_of(notebook, steps=3).runs[0].run_id
    again = write_notebook(tmp_path / "other.ipynb", PARAMETERS, "import torch", "print(steps)")
    assert plan_of(again, steps=3).runs[0].run_id == run_id
    assert plan_of(notebook, steps=4).runs[0].run_id != run_id
    # A default that is written down is the same run.
    assert plan_of(notebook, steps=3, rate=1e-4).runs[0].run_id == run_id
    changed = write_notebook(tmp_path / "c.ipynb", PARAMETERS, "import torch", "print(-steps)")
    assert plan_of(changed, steps=3).runs[0].run_id != run_id
    monkeypatch.setattr(sdkit, "__version__", "99")
    assert plan_of(notebook, steps=3).runs[0].run_id != run_id


def test_two_runs_that_are_the_same_are_refused(notebook):
    grid = {"grid": {"rate": [1, 2]}, "zip": [{"steps": [1, 1], "flag": [False, False]}]}
    with pytest.raises(ValidationError, match="steps = 1, flag = False is there twice"):
        make_plan(notebook, grid)
    grid = {"grid": {"rate": [2, 2.5]}, "zip": [{"name": [None, "x"], "flag": [False, True]}]}
    assert len(make_plan(notebook, grid).runs) == 4


def test_varied_parameters_are_those_that_differ(notebook):
    plan = make_plan(notebook, {"fixed": {"flag": True}, "grid": {"steps": [1, 2], "rate": [0.5]}})
    assert plan.varied == ("steps",)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda p: p, "no such notebook"),
        (lambda p: p.write_text("not json") and p, "not a Jupyter notebook"),
        (lambda p: p.write_text("{}") and p, "not a Jupyter notebook"),
        (lambda p: write_notebook(p, None, "x = 1"), "no code cell is tagged `parameters`"),
        (lambda p: write_notebook(p, "x = ", "1"), "the parameters cell is no Python"),
        (lambda p: write_notebook(p, "# nothing", "1"), "sets nothing"),
        (lambda p: write_notebook(p, "x = 1", language="R"), "in R, expected one in Python"),
    ],
    ids=["missing", "text", "no-notebook", "untagged", "syntax", "empty", "language"],
)
def test_notebooks_that_cannot_be_swept(tmp_path, make, message):
    with pytest.raises(ValidationError, match=message):
        make_plan(make(tmp_path / "n.ipynb"), {"fixed": {"x": 1}})


def test_what_is_warmed_is_what_a_notebook_imports(tmp_path):
    def packages(*cells):
        path = write_notebook(tmp_path / "i.ipynb", "x = 1", *cells)
        return find_packages(nbformat.read(path, as_version=4))

    assert packages("print(1)") == ()
    assert packages("import torch.nn as nn", "from PIL import Image") == ("PIL", "torch")
    assert packages("def f():\n    from sdkit.loading import x") == ("sdkit",)
    assert "sdkit" in packages("%matplotlib inline")


@pytest.mark.parametrize("path", GRIDS, ids=lambda path: path.stem)
def test_bundled_grids_fit_the_notebook_that_they_name(path):
    (command,) = [line for line in path.read_text().splitlines() if "sdkit sweep" in line]
    _, _, _, notebook, name = command.split()
    bundled = ROOT / "sdkit" / "grids" / f"{notebook}.ipynb"
    plan = make_plan(bundled if bundled.exists() else ROOT / notebook, name)
    assert len(plan.runs) >= 4 and name == path.stem


def test_there_are_bundled_grids():
    assert len(GRIDS) >= 2

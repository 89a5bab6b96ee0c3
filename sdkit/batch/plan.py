"""What a sweep will do: each run under an id that tells the same work from other work.

A run that was done is recognised by its id, on any day and from any grid: the same cells, the same
parameters, the same sdkit.
"""

import ast
import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path

import nbformat

import sdkit
from sdkit.batch.grid import read_grid
from sdkit.batch.parameters import (
    MISSING,
    OUTPUT_NAME,
    check_loadable,
    check_run_values,
    check_trainable,
    is_plain,
    read_notebook,
    read_parameters,
)
from sdkit.batch.zygote import WARM
from sdkit.run_folder import replace_file
from sdkit.validation import ValidationError

PLAN_NAME = "sweep.json"
ID_LENGTH = 16


@dataclass(frozen=True)
class Run:
    """One run of the notebook.

    Attributes:
        run_id: Of the notebook's source, all its parameters and sdkit's version.
        values: {name: value} that the grid gives.
        backend: What the notebook's parameter `backend` will be; None if it has none.
    """

    run_id: str
    values: dict
    backend: str | None


@dataclass(frozen=True)
class Plan:
    """A checked sweep.

    Attributes:
        notebook_name: Of its file.
        notebook_folder: Where it lies: runs work there, so that its relative paths hold.
        notebook_json: Its source.
        takes_output: Whether it has a parameter `output_folder`.
        packages: What it imports that can be warmed; see `sdkit.batch.zygote`.
        varied: Names of the parameters that differ between runs.
        runs: In grid order.
    """

    notebook_name: str
    notebook_folder: str
    notebook_json: str
    takes_output: bool
    packages: tuple[str, ...]
    varied: tuple[str, ...]
    runs: tuple[Run, ...]


def make_plan(notebook_path, grid_source, *, here=True):
    """Reads a notebook and a grid, and checks each against the other before anything runs.

    Args:
        notebook_path: The notebook.
        grid_source: See `read_grid`.
        here: Whether the runs are for this machine; see `check_loadable`.

    Raises:
        ValidationError: The notebook, the grid or a value in it cannot be used.
    """
    path = Path(notebook_path)
    notebook = read_notebook(path)
    parameters = read_parameters(notebook, path.name)
    grid = read_grid(grid_source)
    values = [check_run_values(each, parameters, grid) for each in grid.expand()]
    check_loadable(values, grid, path.resolve().parent, here=here)
    defaults = {
        name: parameter.default
        for name, parameter in parameters.items()
        if parameter.default is not MISSING and name != OUTPUT_NAME
    }
    check_trainable(notebook, [defaults | each for each in values], grid)
    runs = tuple(_make_run(notebook, defaults | each, each) for each in values)
    _refuse_twins(runs, grid)
    varied = [name for name in values[0] if len({_canonical(each[name]) for each in values}) > 1]
    return Plan(
        notebook_name=path.name,
        notebook_folder=str(path.resolve().parent),
        notebook_json=nbformat.writes(notebook),
        takes_output=OUTPUT_NAME in parameters,
        packages=find_packages(notebook),
        varied=tuple(varied),
        runs=runs,
    )


def find_packages(notebook):
    """Returns which packages that can be warmed a notebook imports.

    All of them where a cell is no plain Python, as with a magic command.
    """
    found = set()
    for cell in notebook.cells:
        if cell.cell_type == "code":
            try:
                tree = ast.parse(cell.source)
            except SyntaxError:
                return tuple(WARM)
            for node in ast.walk(tree):
                if isinstance(node, ast.Import):
                    found.update(alias.name.partition(".")[0] for alias in node.names)
                elif isinstance(node, ast.ImportFrom):
                    found.add((node.module or "").partition(".")[0])
    return tuple(package for package in WARM if package in found)


def save_plan(plan, folder):
    """Writes what was planned, for `load_results`, and returns its `Path`."""
    path = Path(folder) / PLAN_NAME
    content = {
        "sdkit": sdkit.__version__,
        "notebook": plan.notebook_name,
        "varied": plan.varied,
        "runs": [asdict(run) for run in plan.runs],
    }
    with replace_file(path) as temporary:
        temporary.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    return path


def _make_run(notebook, complete, values):
    source = [cell.source for cell in notebook.cells if cell.cell_type == "code"]
    # A default such as a set stands in the source.
    known = {name: value for name, value in complete.items() if is_plain(value)}
    content = _canonical([source, known, sdkit.__version__])
    run_id = hashlib.sha256(content.encode()).hexdigest()[:ID_LENGTH]
    return Run(run_id, values, complete.get("backend"))


def _canonical(value):
    return json.dumps(value, sort_keys=True)


def _refuse_twins(runs, grid):
    """A group of one axis may spell what another axis has as well."""
    seen = {}
    for run in runs:
        twin = seen.setdefault(run.run_id, run)
        if twin is not run:
            raise ValidationError(
                f"{grid.name}: two runs are the same, {run.values}. Leave one of them out."
            )

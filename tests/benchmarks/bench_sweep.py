"""A grid through `run_sweep` against a shell loop around papermill, one after the other.

The light notebook only imports torch and diffusers and writes a number: what is left is start-up.
The other is notebook 02 at a small size: what is left there is arithmetic, which no warm parent
makes faster. The sweep's own start (its imports, and the warm parent's) is on its clock.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import nbformat

from sdkit import load_results

ROOT = Path(__file__).parent.parent.parent
LIGHT_RUNS, HEAVY_RUNS = 12, 2
SMALL = {"num_inference_steps": 1, "image_size": 64}
SWEEP = (
    "import json, sys; from sdkit import run_sweep; "
    "run_sweep(sys.argv[1], json.loads(sys.argv[2]), output=sys.argv[3], progress=False)"
)


def measure():
    """Returns one row a notebook: seconds of the whole grid, and what a run adds to its own."""
    with tempfile.TemporaryDirectory() as folder:
        light = write_light(Path(folder) / "light.ipynb")
        heavy = ROOT / "notebooks" / "02_fix_precision.ipynb"
        seeds = {"seed": list(range(HEAVY_RUNS))}
        return [
            _compare("light notebook", light, {"grid": {"x": list(range(LIGHT_RUNS))}}, ">= 4"),
            _compare(f"notebook 02, {SMALL}", heavy, {"fixed": SMALL, "grid": seeds}, ""),
        ]


def write_light(path):
    """A notebook that imports torch and diffusers, and next to nothing else."""
    cells = [
        ("x: int = 1\noutput_folder: str = 'out'", ["parameters"]),
        ("import torch, diffusers", []),
        ("y = torch.tensor(x) * 2\nprint(diffusers.__version__, y)", []),
    ]
    notebook = nbformat.v4.new_notebook(
        cells=[nbformat.v4.new_code_cell(source, metadata={"tags": t}) for source, t in cells],
        metadata={
            "kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"},
            "language_info": {"name": "python"},
        },
    )
    nbformat.write(notebook, path)
    return path


def _compare(case, notebook, grid, limit):
    with tempfile.TemporaryDirectory() as folder:
        (values,) = grid["grid"].items()
        fixed = "".join(f" -p {name} {value}" for name, value in grid.get("fixed", {}).items())
        loop = (
            f"for v in {' '.join(map(str, values[1]))}; do {sys.executable} -m papermill "
            f"{notebook} {folder}/$v.ipynb "
            f"-p {values[0]} $v{fixed} -p output_folder {folder}/loop_$v "
            f"--cwd {notebook.parent} --no-progress-bar --log-level WARNING || exit 1; done"
        )
        sweep = [sys.executable, "-c", SWEEP, str(notebook), json.dumps(grid), f"{folder}/sweep"]
        baseline_seconds, baseline_cpu = _time(["bash", "-c", loop])
        ours_seconds, ours_cpu = _time(sweep)
        table = load_results(Path(folder) / "sweep")
        assert table["good"].all(), table["error"]
    return {
        "benchmark": "sweep",
        "case": f"{case}, {len(values[1])} runs, {len(os.sched_getaffinity(0))} cores",
        "baseline": "papermill in a shell loop",
        "ours": "run_sweep",
        "baseline_seconds": baseline_seconds,
        "ours_seconds": ours_seconds,
        "ratio": baseline_seconds / ours_seconds,
        "pairs": 1,
        "limit": limit,
        "baseline_cpu_seconds": baseline_cpu,
        "ours_cpu_seconds": ours_cpu,
        "median_run_seconds": table["seconds"].median(),
    }


def _time(command):
    """Returns (wall seconds, CPU seconds of it and its children) of a command that succeeds."""
    before, started = os.times(), time.perf_counter()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    after = os.times()
    cpu = after.children_user - before.children_user + after.children_system
    return time.perf_counter() - started, cpu - before.children_system

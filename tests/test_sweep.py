"""Sweeps as they are run: what is told of every ending, nothing lost, nothing twice, nobody left.

Real kernels, real papermill, a real Dask; the notebooks import little, so that warming is quick.
"""

import json
import os
import re
import resource
import shutil
import signal
import socket
import subprocess
import sys
import time
from contextlib import contextmanager

import nbformat
import pandas as pd
import psutil
import pytest
from sweep_notebooks import write_behaving, write_notebook, write_slow
from typer.testing import CliRunner

from sdkit import load_results, run_sweep
from sdkit.batch import scheduling
from sdkit.batch.kernels import ForkedKernel, Zygote, close_zygote, warm_zygote
from sdkit.batch.lock import is_held, lock_folder
from sdkit.batch.page import save_page
from sdkit.batch.results import save_results
from sdkit.cli import app
from sdkit.validation import ValidationError

SWEEP = (
    "import json, sys; from sdkit import run_sweep; "
    "run_sweep(*json.loads(sys.argv[1]), progress=False, **json.loads(sys.argv[2]))"
)


def sdkit(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def start_sweep(notebook, grid, stderr=subprocess.DEVNULL, **arguments):
    """A sweep in a process of its own, to be killed."""
    command = [sys.executable, "-c", SWEEP, json.dumps([str(notebook), grid])]
    arguments = json.dumps({name: str(value) for name, value in arguments.items()})
    return subprocess.Popen([*command, arguments], stderr=stderr, text=True)


def wait_until(condition, seconds=90):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.05)


def read_marks(folder):
    return {path.name: path.read_text() for path in sorted(folder.glob("run_*"))}


@pytest.fixture(scope="module")
def marks(tmp_path_factory):
    return tmp_path_factory.mktemp("marks")


@pytest.fixture(scope="module")
def swept(tmp_path_factory, marks):
    """One sweep with every ending in it: its folder, and its results by mode."""
    folder = tmp_path_factory.mktemp("swept")
    notebook = write_behaving(folder / "n.ipynb", marks)
    grid = {
        "fixed": {"number": 3},
        "grid": {"mode": ["ok", "raise", "die", "exit", "hang", "once"]},
    }
    table = run_sweep(
        notebook, grid, output=folder / "out", jobs=3, retry=1, timeout=5, progress=False
    )
    return folder / "out", notebook, grid, table.set_index("mode")


@pytest.mark.parametrize(
    ("mode", "status", "attempts", "error", "cell"),
    [
        ("ok", "done", 1, None, None),
        ("raise", "failed", 2, "ValueError: planted", 2),
        ("die", "kernel-died", 2, "the kernel was killed from outside, as the system", 2),
        ("exit", "kernel-died", 2, "the kernel ended by itself (exit code 3)", 2),
        ("hang", "timeout", 2, "stopped after 5 s, the limit", 2),
        ("once", "done", 2, None, None),
    ],
)
def test_every_ending_is_told_and_the_rest_goes_on(swept, mode, status, attempts, error, cell):
    row = swept[3].loc[mode]
    assert (row["status"], row["attempts"]) == (status, attempts)
    assert row["good"] == (status == "done")
    if error is None:
        assert pd.isna(row["error"]) and pd.isna(row["failed_cell"])
        assert row["metric: half"] == 1.5
    else:
        assert row["error"].startswith(error)
        assert row["failed_cell"] == cell and 'mode == "die"' in row["failed_source"]
    assert row["kernel"] == "forked" and 0 < row["cpu_seconds"] < 60


def test_results_read_back_the_same_from_all_three(swept):
    folder, _, _, table = swept
    loaded = load_results(folder)
    assert loaded.attrs["varied"] == ["mode"]
    pd.testing.assert_frame_equal(loaded.set_index("mode"), table)
    for written in (
        pd.read_csv(folder / "results.csv"),
        pd.read_parquet(folder / "results.parquet"),
    ):
        assert list(written.columns) == list(loaded.columns)
        assert list(written["run_id"]) == list(loaded["run_id"])
        assert written["seconds"].tolist() == pytest.approx(loaded["seconds"].tolist())
    assert (folder / "figure.png").stat().st_size > 1000
    assert not (folder / "attempts").exists()


def test_done_runs_are_skipped_and_failed_ones_are_not(swept, tmp_path):
    folder, notebook, grid, table = swept
    folder = shutil.copytree(folder, tmp_path / "out")  # others read what the first sweep wrote
    grid = {**grid, "grid": {"mode": ["ok", "raise"]}}
    before = (folder / table.loc["ok", "path"] / "run.json").stat().st_mtime_ns
    again = run_sweep(notebook, grid, output=folder, progress=False).set_index("mode")
    assert (folder / again.loc["ok", "path"] / "run.json").stat().st_mtime_ns == before
    assert list(again["status"]) == ["done", "failed"]
    assert again.loc["raise", "attempts"] == 1  # without retry: it was run again
    forced = run_sweep(
        notebook, {"fixed": {"number": 3, "mode": "ok"}}, output=folder, force=True, progress=False
    )
    assert list(forced["status"]) == ["done"]
    assert (folder / forced["path"][0] / "run.json").stat().st_mtime_ns > before


LOAD = """
import torch
from sdkit import amplify, generate, load_pipeline
fresh = not hasattr(torch, "planted") and float(torch.nn.functional.silu(torch.ones(1))) > 0
pipe, report = load_pipeline("mini", backend="cpu", dtype="float32", progress=False)
weight = float(pipe.unet.conv_in.weight.abs().max())
"""
SPOIL = """
if ill:
    amplify(pipe.unet, 12)
    torch.planted = True
    torch.nn.functional.silu = lambda x, inplace=False: x * float("nan")
    torch.set_default_dtype(torch.float64)
"""
MEASURE = """
import json, os, pathlib, numpy
measured = {
    "fresh": int(fresh), "weight": weight, "pid": os.getpid(), "parent": os.getppid(),
    "after": float(pipe.unet.conv_in.weight.abs().max()), "random": float(numpy.random.rand()),
    "bytes": torch.get_default_dtype().itemsize,
}
drawn = generate(
    pipe, "red boots on grass", num_inference_steps=2, guidance_scale=2, image_size=64,
    on_nonfinite="skip", progress=False,
)
folder = pathlib.Path(output_folder)
folder.mkdir(parents=True)
(folder / "metrics.json").write_text(json.dumps(measured | {"valid": drawn.valid_count}))
"""


def test_nothing_leaks_from_one_run_to_the_next(tmp_path):
    """Both runs in one warm parent: the first amplifies the model and patches torch."""
    notebook = write_notebook(
        tmp_path / "n.ipynb", 'ill: bool = False\noutput_folder: str = "x"', LOAD, SPOIL, MEASURE
    )
    table = run_sweep(
        notebook, {"grid": {"ill": [True, False]}}, output=tmp_path / "out", jobs=1, progress=False
    )
    assert list(table["status"]) == ["done", "done"], list(table["error"])
    ill, healthy = table.to_dict("records")
    assert ill["metric: after"] == ill["metric: weight"] * 2**12  # it was amplified
    assert healthy["metric: after"] == healthy["metric: weight"] == ill["metric: weight"]
    assert (ill["metric: valid"], healthy["metric: valid"]) == (0, 1)
    assert healthy["metric: fresh"] == 1 and healthy["metric: bytes"] == 4
    assert ill["metric: bytes"] == 8
    assert ill["metric: parent"] == healthy["metric: parent"]  # the same warm parent
    assert ill["metric: pid"] != healthy["metric: pid"]
    assert ill["metric: random"] != healthy["metric: random"]


def test_the_cores_are_shared_among_the_runs_that_there_are(tmp_path, monkeypatch):
    monkeypatch.setattr("sdkit.batch.sweep.count_cores", lambda: 4)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    notebook = write_notebook(
        tmp_path / "n.ipynb",
        'x: int = 1\noutput_folder: str = ""',
        "import json, os, pathlib\npathlib.Path(output_folder).mkdir()\n"
        "told = {'threads': int(os.environ['OMP_NUM_THREADS'])}\n"
        "(pathlib.Path(output_folder) / 'metrics.json').write_text(json.dumps(told))",
    )
    for values, threads in (([1], 4), ([1, 2], 2)):
        out = tmp_path / str(len(values))
        table = run_sweep(notebook, {"grid": {"x": values}}, output=out, progress=False)
        assert list(table["metric: threads"]) == [threads] * len(values), list(table["error"])


def test_figures_are_shown_and_notebooks_run_in_their_folder(tmp_path):
    notebook = write_notebook(
        tmp_path / "n.ipynb",
        "x: int = 1",
        "import matplotlib.pyplot as plt\nplt.plot([1, 2])\nplt.show()",
        "import os\nprint(os.getcwd())",
    )
    table = run_sweep(notebook, {"fixed": {"x": 2}}, output=tmp_path / "out", progress=False)
    (path,) = table["path"]
    cells = json.loads((tmp_path / "out" / path / "notebook.ipynb").read_text())["cells"]
    outputs = [output for cell in cells for output in cell.get("outputs", [])]
    assert any("image/png" in output.get("data", {}) for output in outputs)
    assert [o["text"] for o in outputs if o["output_type"] == "stream"] == [[f"{tmp_path}\n"]]


def test_killed_at_any_moment_and_started_again(tmp_path):
    """Nothing is lost, nothing is done twice, and no kernel outlives the sweep."""
    marks = tmp_path / "marks"
    marks.mkdir()
    notebook = write_slow(tmp_path / "n.ipynb", marks, 1.0)
    grid, output = {"grid": {"number": [1, 2, 3, 4, 5]}}, tmp_path / "out"
    for wanted in (0, 2):  # with none done, and later with two
        process = start_sweep(notebook, grid, output=output)
        begun = len(read_marks(marks))
        wait_until(
            lambda wanted=wanted, begun=begun: (
                len(list(output.glob("runs/*"))) >= wanted and len(read_marks(marks)) > begun
            )
        )
        family = psutil.Process(process.pid).children(recursive=True)
        assert family
        process.kill()
        process.wait()
        wait_until(lambda family=family: not any(_is_running(p) for p in family), seconds=10)
    partial = load_results(output)
    done = set(partial["run_id"][partial["status"] == "done"])
    assert len(done) >= 2 and set(partial["status"]) == {"done", "waiting"}
    ended = {name for name, text in read_marks(marks).items() if text.endswith("e")}
    kept = {path: (output / path / "run.json").stat().st_mtime_ns for path in partial["path"][:2]}
    table = run_sweep(notebook, grid, output=output, progress=False)
    assert list(table["status"]) == ["done"] * 5
    assert kept == {path: (output / path / "run.json").stat().st_mtime_ns for path in kept}
    after = read_marks(marks)
    for number in partial["number"][partial["status"] == "done"]:
        assert after[f"run_{number}"].count("e") == 1  # what was done is not done again
    assert all(text.endswith("e") for text in after.values()) and ended <= set(after)
    assert sorted(os.listdir(output / "runs")) == sorted(table["run_id"])


def _is_running(process):
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def test_a_half_written_run_is_never_taken_for_done(tmp_path, marks):
    notebook = write_behaving(tmp_path / "n.ipynb", marks)
    grid = {"fixed": {"mode": "ok"}}
    (run_id,) = run_sweep(notebook, grid, output=tmp_path / "out", progress=False)["run_id"]
    done = tmp_path / "out" / "runs" / run_id
    half = tmp_path / "out" / "attempts" / f"{run_id}.0"
    half.parent.mkdir()
    done.rename(half)  # as a sweep leaves it that is killed just before the last step
    assert list(load_results(tmp_path / "out")["status"]) == ["waiting"]
    table = run_sweep(notebook, grid, output=tmp_path / "out", progress=False)
    assert list(table["status"]) == ["done"] and not half.exists()


def test_two_sweeps_on_one_folder(tmp_path, marks):
    notebook = write_behaving(tmp_path / "n.ipynb", marks)
    with lock_folder(tmp_path) as token:
        assert is_held(tmp_path, token) and not is_held(tmp_path, "another")
        with pytest.raises(ValidationError, match=f"another sweep is at work here.*{os.getpid()}"):
            run_sweep(notebook, {"fixed": {"mode": "ok"}}, output=tmp_path, progress=False)
    assert not is_held(tmp_path, token)
    assert not (tmp_path / "runs").exists()


def test_kernels_end_with_whoever_wanted_them(tmp_path):
    with Zygote() as zygote:
        zygote.wait_until_ready()
        assert zygote.trouble is None
        kernels = [_fork(zygote, tmp_path / f"{i}.json") for i in range(3)]
        assert [kernel.poll() for kernel in kernels] == [None] * 3
        kernels[0].kill()
        assert kernels[0].wait() == -signal.SIGKILL and kernels[0].used["cpu_seconds"] > 0
        kernels[1]._life.close()  # whoever asked for it is gone
        wait_until(lambda: not psutil.pid_exists(kernels[1].pid), seconds=10)
        assert kernels[2].poll() is None
    assert kernels[2].wait() == -signal.SIGKILL
    assert not psutil.pid_exists(kernels[2].pid) and not os.path.exists(zygote.folder)


def test_how_a_kernel_ended_that_ended_at_once_is_known():
    ours, theirs = socket.socketpair()
    theirs.sendall(b'{"pid": 7}\n{"exit_code": 3, "cpu_seconds": 0.5}\n')
    theirs.close()
    kernel = ForkedKernel(ours)
    assert (kernel.pid, kernel.wait(), kernel.used) == (7, 3, {"cpu_seconds": 0.5})


def test_kernels_end_when_the_warm_parent_is_killed(tmp_path):
    with Zygote() as zygote:
        zygote.wait_until_ready()
        kernel = _fork(zygote, tmp_path / "k.json")
        psutil.Process(zygote._process.pid).kill()
        wait_until(lambda: not _is_running_pid(kernel.pid), seconds=10)
        assert kernel.wait() == -signal.SIGKILL and zygote.is_lost()


def test_what_a_killed_warm_parent_left_is_taken_away(tmp_path):
    try:
        first = warm_zygote(("numpy",), 3)
        first.wait_until_ready()
        first._process.kill()
        first._process.wait()
        assert os.path.exists(first.folder)
        second = warm_zygote(())
        assert second is not first and not os.path.exists(first.folder) and not first.is_closed
        assert (second.packages, second.threads) == (("numpy",), 3)
    finally:
        close_zygote()
    assert not os.path.exists(second.folder)


def _is_running_pid(pid):
    return psutil.pid_exists(pid) and _is_running(psutil.Process(pid))


def _fork(zygote, connection_file):
    from jupyter_client.connect import write_connection_file

    write_connection_file(str(connection_file), transport="ipc", ip=str(connection_file) + "-ipc")
    return zygote.fork(
        connection_file, cwd=connection_file.parent, environment=dict(os.environ), log=os.devnull
    )


def test_where_nothing_can_be_forked_kernels_start_from_nothing(tmp_path, marks, monkeypatch):
    wait = Zygote.wait_until_ready

    def without_fork(self):
        wait(self)
        self.trouble = "this system cannot fork"

    monkeypatch.setattr(Zygote, "wait_until_ready", without_fork)
    notebook = write_behaving(tmp_path / "n.ipynb", marks)
    table = run_sweep(
        notebook, {"grid": {"mode": ["ok", "die"]}}, output=tmp_path / "out", jobs=2, progress=False
    )
    assert list(table["status"]) == ["done", "kernel-died"]
    assert set(table["kernel"]) == {"from nothing: this system cannot fork"}


@contextmanager
def dask_cluster(folder, workers):
    """A scheduler and workers started as by hand; yields its address and the processes."""
    where = folder / "scheduler.json"
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL, "cwd": folder}
    dask = [sys.executable, "-m", "dask"]
    started = [
        subprocess.Popen(
            [*dask, "scheduler", "--host", "127.0.0.1", "--port", "0", "--no-dashboard",
             "--scheduler-file", str(where)], **quiet,
        )
    ]  # fmt: skip
    try:
        wait_until(where.exists)
        started += [
            subprocess.Popen(
                [*dask, "worker", "--scheduler-file", str(where), "--nthreads", "1", "--no-nanny",
                 "--no-dashboard", "--resources", "accelerator=1"], **quiet,
            )
            for _ in range(workers)
        ]  # fmt: skip
        yield json.loads(where.read_text())["address"], started
    finally:
        for process in started:
            process.kill()
            process.wait()


def test_a_scheduler_and_two_workers_one_of_them_killed_in_the_middle(tmp_path):
    marks = tmp_path / "marks"
    marks.mkdir()
    notebook = write_slow(tmp_path / "n.ipynb", marks, 1.0)
    grid, output = {"grid": {"number": [1, 2, 3, 4, 5, 6]}}, tmp_path / "out"
    with dask_cluster(tmp_path, 2) as (address, (scheduler, *workers)):
        sweep = start_sweep(notebook, grid, output=output, scheduler=address)
        wait_until(lambda: len(list(output.glob("runs/*"))) >= 2)
        workers[0].kill()
        assert sweep.wait(timeout=120) == 0
        table = load_results(output)
        assert list(table["status"]) == ["done"] * 6
        after = read_marks(marks)
        assert [text.count("e") for text in after.values()] == [1] * 6
        assert sum(text.count("s") for text in after.values()) <= 7  # one was cut off at most
        # A killed sweep is not worked for any longer, though the workers live.
        more = {"grid": {"number": [11, 12, 13]}, "fixed": {"seconds": 30.0}}
        sweep = start_sweep(notebook, more, output=output, scheduler=address)
        wait_until(lambda: len(read_marks(marks)) > 6)
        sweep.kill()
        sweep.wait()
        kernels = psutil.Process(workers[1].pid)
        wait_until(lambda: len(kernels.children(recursive=True)) <= 1, seconds=15)
        assert not any("e" in read_marks(marks).get(f"run_{n}", "") for n in (11, 12, 13))
        # A scheduler that goes away is an error, and what is done stays done.
        more = {"grid": {"number": [21, 22]}, "fixed": {"seconds": 1.0}}
        sweep = start_sweep(
            notebook, more, output=output, scheduler=address, stderr=subprocess.PIPE
        )
        wait_until(lambda: "e" in read_marks(marks).get("run_21", ""))
        wait_until(lambda: "run_22" in read_marks(marks))
        scheduler.kill()
        _, told = sweep.communicate(timeout=60)
        assert sweep.returncode == 1 and "the Dask scheduler is gone" in told
        assert load_results(output).set_index("number").loc[21, "status"] == "done"


def test_schedulers_that_cannot_be_used(tmp_path, marks, monkeypatch):
    monkeypatch.setattr(scheduling, "CONNECT_SECONDS", 1)
    notebook = write_behaving(tmp_path / "n.ipynb", marks)
    result = sdkit("sweep", notebook, _write_grid(tmp_path), "--scheduler", "tcp://127.0.0.1:9",
                   "--output", tmp_path / "out")  # fmt: skip
    assert result.exit_code == 2
    assert "tcp://127.0.0.1:9: no Dask scheduler answers there" in result.stderr


@pytest.mark.parametrize("address", ["tls://127.0.0.1:9", 5, ""])
def test_addresses_that_are_none(address):
    with (
        pytest.raises(ValidationError, match="no Dask scheduler answers there"),
        scheduling.connect(address, jobs=1, has_device=False),
    ):
        pass


def test_a_bad_scheduler_is_one_line(tmp_path):
    """In a process of its own: dask's half-made client would speak when Python ends."""
    code = (
        "import sys; from sdkit.batch.scheduling import connect\n"
        "try: connect('localhost', jobs=1, has_device=False).__enter__()\n"
        "except ValueError as error: print(error)"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert (ran.returncode, ran.stderr) == (0, "")
    assert ran.stdout.startswith("localhost: no Dask scheduler answers there")


def _write_grid(tmp_path, text="grid: {mode: [ok]}"):
    path = tmp_path / "grid.yaml"
    path.write_text(text)
    return path


def test_the_exit_code_and_json_tell(tmp_path, marks):
    notebook, output = write_behaving(tmp_path / "n.ipynb", marks), tmp_path / "out"
    good = sdkit("sweep", notebook, _write_grid(tmp_path), "--output", output, "--json")
    told = json.loads(good.stdout)
    assert (good.exit_code, [run["status"] for run in told["runs"]]) == (0, ["done"])
    assert told["runs"][0]["metric: half"] == 0.5 and told["folder"] == str(output)
    grid = _write_grid(tmp_path, "grid: {mode: [ok, raise]}")
    bad = sdkit("sweep", notebook, grid, "--output", output)
    assert bad.exit_code == 1
    assert "failed       mode=raise: ValueError: planted (cell 2)" in bad.stdout
    assert "1 of 2 runs are good" in bad.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["missing.ipynb", "grid.yaml"], "missing.ipynb: no such notebook"),
        (["n.ipynb", "missing.yaml"], "missing.yaml: no such file"),
        (["n.ipynb", "grid.yaml", "--jobs", "0"], "jobs=0"),
        (["n.ipynb", "grid.yaml", "--retry", "-1"], "retry=-1"),
        (["n.ipynb", "grid.yaml", "--timeout", "0"], "timeout=0"),
        (["n.ipynb", "grid.yaml", "--output", "n.ipynb"], "n.ipynb: cannot be written"),
        (["n.ipynb", "grid.yaml", "--output", "/proc/out"], "/proc/out: cannot be written"),
        (["n.ipynb", "wrong.yaml"], "wrong.yaml, line 2: 'mood' is no parameter"),
    ],
    ids=str,
)
def test_what_cannot_be_swept_exits_with_2_and_starts_nothing(
    tmp_path, marks, monkeypatch, arguments, message
):
    monkeypatch.chdir(tmp_path)
    write_behaving(tmp_path / "n.ipynb", marks)
    _write_grid(tmp_path)
    (tmp_path / "wrong.yaml").write_text("grid:\n  mood: [ok]\n")
    result = sdkit("sweep", *arguments)
    assert (result.exit_code, result.stdout) == (2, "")
    assert message in result.stderr and len(result.stderr.splitlines()) == 1
    assert not list(tmp_path.rglob("runs/*/*/*"))


def test_no_sweep_to_read(tmp_path):
    with pytest.raises(ValidationError, match="no sweep there"):
        load_results(tmp_path)


def test_one_device_runs_one_notebook_at_a_time(tmp_path, monkeypatch):
    """Three jobs, but a device that two cannot share; what says "cpu" does not need it."""
    monkeypatch.setattr("sdkit.batch.sweep._has_device", lambda backends: backends != {"cpu"})
    spans = {}
    for backend in ("auto", "cpu"):
        folder = tmp_path / backend
        folder.mkdir()
        notebook = write_notebook(
            folder / "n.ipynb",
            f'number: int = 1\nbackend: str = "{backend}"\nmarks: str = {str(folder)!r}',
            "import pathlib, time\nbegun = time.time()\ntime.sleep(1)\n"
            "(pathlib.Path(marks) / f'run_{number}').write_text(f'{begun} {time.time()}')",
        )
        grid = {"grid": {"number": [1, 2, 3]}}
        table = run_sweep(notebook, grid, output=folder / "out", jobs=3, progress=False)
        assert set(table["status"]) == {"done"}
        spans[backend] = sorted(
            tuple(map(float, text.split())) for text in read_marks(folder).values()
        )
    pairs = {backend: list(zip(found, found[1:], strict=False)) for backend, found in spans.items()}
    assert all(before[1] <= after[0] for before, after in pairs["auto"])
    assert any(before[1] > after[0] for before, after in pairs["cpu"])


def test_a_warm_parent_that_cannot_import_is_told_and_done_without(tmp_path, monkeypatch):
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "skimage").mkdir()
    (broken / "skimage" / "__init__.py").write_text("raise ImportError('planted')")
    monkeypatch.setenv("PYTHONPATH", str(broken))
    notebook = write_notebook(tmp_path / "n.ipynb", "x: int = 1", "if x > 1:\n    import skimage")
    table = run_sweep(
        notebook, {"grid": {"x": [1, 2]}}, output=tmp_path / "out", jobs=1, progress=False
    )
    assert list(table["status"]) == ["done", "failed"]
    assert set(table["kernel"]) == {"from nothing: the warm parent ended (ImportError: planted)"}
    assert table["error"][1] == "ImportError: planted"


def test_names_paths_and_values_that_could_be_mistaken(tmp_path):
    """A parameter named like a result, braces in a path, markup and line ends in a value."""
    notebook = write_notebook(
        tmp_path / "n.ipynb",
        'seconds: float = 1.0\nprompt: str = ""\nshape: list = [1]\noutput_folder: str = ""',
        "import pathlib\npathlib.Path(output_folder).mkdir(parents=True)\nprint(repr(prompt))",
    )
    prompts = ['<script>alert("x")</script>', "two\nlines\tand {cards} for $x^$"]
    grid = {"grid": {"prompt": prompts, "shape": [[1, 2], [3]]}, "fixed": {"seconds": 2}}
    folder = tmp_path / "{a} folder{b"
    table = run_sweep(notebook, grid, output=folder, progress=False)
    assert set(table["status"]) == {"done"}
    assert set(table["parameter: seconds"]) == {2.0} and table["seconds"].max() != 2.0
    assert list(load_results(folder)["shape"]) == [[1, 2], [3]] * 2
    assert list(pd.read_parquet(folder / "results.parquet")["shape"]) == ["[1, 2]", "[3]"] * 2
    page = (folder / "index.html").read_text()
    assert "<script>alert" not in page and "&lt;script&gt;alert" in page
    assert page.count("<article ") == 4 and "and {cards}" in page


def test_the_page_asks_nobody_for_anything(swept):
    folder, *_ = swept
    pages = [folder / "index.html", *folder.glob("*/*/notebook.html")]
    assert len(pages) >= 6
    for page in pages:
        asked = re.findall(r"""(?:src|href)=["']([^"']+)|url\(([^)]+)|@import""", page.read_text())
        links = {first or second for first, second in asked}
        assert not [link for link in links if re.match(r"(https?:)?//", link)], page
    index = pages[0].read_text()
    linked = re.findall(r'href="([^"]+\.html)"', index)
    assert len(linked) == 6 and all((folder / link).is_file() for link in linked)
    assert '<select data-name="mode">' in index and 'name="viewport"' in index
    assert "color-scheme: light dark" in index


def test_an_interrupt_leaves_a_table_and_no_kernel(tmp_path):
    marks = tmp_path / "marks"
    marks.mkdir()
    notebook = write_slow(tmp_path / "n.ipynb", marks, 1.0)
    grid = tmp_path / "g.yaml"
    grid.write_text("grid: {number: {from: 1, to: 9, step: 1}}")
    command = [sys.executable, "-m", "sdkit", "sweep", str(notebook), str(grid)]
    process = subprocess.Popen(
        [*command, "--output", str(tmp_path / "out"), "--jobs", "2"],
        stderr=subprocess.PIPE, text=True,
        # What a shell starts with & ignores interrupts, and so does all that it starts.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )  # fmt: skip
    wait_until(lambda: len(list((tmp_path / "out").glob("runs/*"))) >= 1)
    family = psutil.Process(process.pid).children(recursive=True)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=30)
    assert process.returncode == 130 and said.splitlines()[-1] == "interrupted"
    assert not any(_is_running(member) for member in family)
    written = pd.read_csv(tmp_path / "out" / "results.csv")
    assert {"done", "waiting"} == set(written["status"]) and len(written) == 9
    assert not (tmp_path / "out" / "failed").exists()


def test_what_is_damaged_is_told_and_made_again(tmp_path, marks):
    notebook = write_behaving(tmp_path / "n.ipynb", marks)
    grid, out = {"grid": {"number": [1.0, 2.0, 3.0]}}, tmp_path / "out"
    table = run_sweep(notebook, grid, output=out, jobs=1, progress=False)
    first, second, third = (out / path for path in table["path"])
    (first / "run.json").write_text('{"status": "do')
    (second / "output" / "metrics.json").write_text("[1, 2]")
    (third / "output" / "verdicts.json").write_text('[{"question": "half"}]')
    read = load_results(out)
    assert list(read["status"]) == ["waiting", "done", "done"]
    assert not read["good"].any() and "cannot be read" in read["error"][1]
    again = run_sweep(notebook, grid, output=out, jobs=1, progress=False)
    assert list(again["status"]) == ["done"] * 3
    assert again["good"][0] and again["metric: half"][0] == 0.5
    (second / "notebook.html").unlink()  # as where the sweep was killed before it was written
    assert not again["good"][1:].any()  # a notebook's own results are not made again unasked
    run_sweep(notebook, grid, output=out, jobs=1, progress=False)
    assert (second / "notebook.html").is_file()
    (second / "notebook.html").unlink()
    (second / "notebook.ipynb").write_text('{"cells": [')  # damaged: no page can be made of it
    again = run_sweep(notebook, grid, output=out, jobs=1, progress=False)
    assert list(again["status"]) == ["done"] * 3 and not (second / "notebook.html").exists()
    assert run_sweep(notebook, grid, output=out, jobs=1, progress=False, force=True)["good"].all()


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"runs": []}', '{"runs": [1], "varied": []}'])
def test_a_damaged_plan_is_no_sweep(tmp_path, text):
    (tmp_path / "sweep.json").write_text(text)
    with pytest.raises(ValidationError, match="no sweep there"):
        load_results(tmp_path)


@pytest.mark.parametrize(
    ("choice", "message"),
    [
        ({"grid": None}, "grid: got NoneType"),
        ({"grid": ["x"]}, "grid: got list"),
        ({"notebook": 3}, "notebook: got 3"),
        ({"jobs": "2"}, "jobs='2'"),
        ({"jobs": 1.5}, "jobs=1.5: expected a whole number, 1 or more"),
        ({"retry": True}, "retry=True"),
        ({"timeout": "9"}, "timeout='9'"),
    ],
)
def test_arguments_of_the_wrong_kind_are_refused(tmp_path, marks, choice, message):
    notebook = write_behaving(tmp_path / "n.ipynb", marks)
    asked = {"notebook": notebook, "grid": {"grid": {"number": [1.0]}}, **choice}
    with pytest.raises(ValidationError, match=re.escape(message)):
        run_sweep(asked.pop("notebook"), asked.pop("grid"), output=tmp_path / "out", **asked)
    assert not (tmp_path / "out").exists()


def test_a_notebook_runs_here_whatever_kernel_it_names_or_none(tmp_path):
    """One without metadata, and one that papermill has executed in some environment of somebody."""
    path = write_notebook(tmp_path / "n.ipynb", "number: int = 1\nplaces = {1, 2}", "1 / number")
    notebook = nbformat.read(path, as_version=4)
    injected = nbformat.v4.new_code_cell("number = 5", metadata={"tags": ["injected-parameters"]})
    notebook.cells.insert(2, injected)
    for metadata in ({}, {"kernelspec": {"name": "conda-env-x", "display_name": "x"}}):
        notebook.metadata = metadata
        nbformat.write(notebook, path)
        table = run_sweep(
            path, {"grid": {"number": [2, 0]}}, output=tmp_path / "out", progress=False, force=True
        )
        assert list(table["status"]) == ["done", "failed"]
        assert table["failed_cell"][1] == 3 and table["failed_source"][1] == "1 / number"


ODD_ENDINGS = """
import pathlib, sys
from PIL import Image
folder = pathlib.Path(output_folder)
folder.mkdir()
Image.new("RGB", (64, 64), "red").save(folder / "image_000.png")
if mode == "cut":
    (folder / "image_000.png").write_bytes((folder / "image_000.png").read_bytes()[:60])
if mode == "words":
    (folder / "image_000.png").write_text("no picture")
if mode == "leave":
    sys.exit(0)
if mode == "long":
    raise ValueError("y" * 1_000_000)
"""


def test_pictures_that_cannot_be_opened_early_ends_and_long_errors(tmp_path):
    write_notebook(
        tmp_path / "n$^$.ipynb",
        'mode: str = ""\nnumber: float = 1\noutput_folder = ""',
        ODD_ENDINGS,
        "1",
    )
    grid, out = tmp_path / "g.yaml", tmp_path / "out"
    grid.write_text(
        "grid: {mode: [good, cut, words, leave, long]}\n"
        "fixed: {number: .inf}\nexclude: [{mode: good}]"
    )
    ran = sdkit("sweep", tmp_path / "n$^$.ipynb", grid, "--output", out, "--json")
    assert ran.exit_code == 1, ran.output
    told = json.loads(ran.stdout, parse_constant=pytest.fail)["runs"]  # Infinity is not JSON
    assert [run["status"] for run in told] == ["done"] * 3 + ["failed"]
    assert told[2]["error"].startswith("SystemExit") and told[2]["failed_cell"] == 2
    assert 2000 < len(told[3]["error"]) < 2100 and told[0]["error"] is None
    assert (out / "figure.png").is_file() and (out / "index.html").stat().st_size < 100_000
    assert (out / "index.html").read_text().count("<img ") == 1  # of the one that left early
    again = sdkit("sweep", tmp_path / "n$^$.ipynb", grid, "--output", out)
    lines = again.stdout.splitlines()
    assert max(map(len, lines)) < 400 and "mode=leave: SystemExit" in lines[0]


def test_a_disk_that_takes_no_more_is_not_a_dead_kernel(tmp_path):
    """The limit for one file stands in for a full disk: papermill cannot save its cells."""
    notebook = write_notebook(
        tmp_path / "n.ipynb", "letters: int = 1", "print('x' * letters)", "print('y')"
    )
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, hard))
    try:
        grid = {"grid": {"letters": [400_000, 5]}}
        table = run_sweep(notebook, grid, output=tmp_path / "out", jobs=1, progress=False)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert list(table["status"]) == ["failed", "done"]
    assert "File too large" in table["error"][0]
    again = run_sweep(notebook, grid, output=tmp_path / "out", jobs=1, progress=False)
    assert list(again["status"]) == ["done", "done"]


def plan_by_hand(folder, *values, **record):
    """A sweep as it lies on the disk, with one record: for what a kernel would only make slow."""
    runs = [{"run_id": f"id{i}", "values": {"x": value}} for i, value in enumerate(values)]
    plan = {"notebook": "n.ipynb", "varied": ["x"], "runs": runs}
    (folder / "sweep.json").write_text(json.dumps(plan))
    (folder / "runs" / "id0").mkdir(parents=True)
    (folder / "runs" / "id0" / "run.json").write_text(json.dumps({"run_id": "id0", **record}))


@pytest.mark.parametrize(
    "damage",
    [{"status": "dnoe"}, {"seconds": "3"}, {"error": 5}, {"failed_cell": 1.5}, {"attempts": True}],
    ids=str,
)
def test_a_record_with_what_no_sweep_writes_is_no_run(tmp_path, damage):
    plan_by_hand(tmp_path, 1, 2, **{"status": "done", "seconds": 3.0} | damage)
    assert list(load_results(tmp_path)["status"]) == ["waiting", "waiting"]


def test_only_what_a_record_is_for_is_read_from_it(tmp_path):
    plan_by_hand(tmp_path, 1, 2, status="done", x=99, path="/etc", good=False)
    table = load_results(tmp_path)
    assert list(table["x"]) == [1, 2] and table["path"][0] == "runs/id0" and table["good"][0]
    assert save_page(table, tmp_path).is_file()


def test_every_value_has_a_filter_of_its_own(tmp_path):
    values = [1, "1", "", " ", None, "None", "a b", "a  b\n", 'q"<b>', "y" * 5000, [1, [None]]]
    plan_by_hand(tmp_path, *values, status="done")
    page = save_page(load_results(tmp_path), tmp_path).read_text()
    options = re.findall(r'<option value="([^"]*)">', page.partition('data-name="x"')[2])
    assert options[0] == "" and len(set(options[1:])) == len(values)  # "" is "all"
    tags = re.findall(r'data-tags="status\t[\w-]+\nx\t([^"]*)"', page)
    assert tags == options[1:]
    assert max(map(len, re.findall(r">([^<]*)</option>", page))) <= 100


def test_values_of_several_types_stay_what_they_are(tmp_path):
    plan_by_hand(tmp_path, 7, None, status="done", seconds=1.0)
    table = load_results(tmp_path)
    assert list(table["x"]) == [7, None] and type(table["x"][0]) is int
    save_results(table, tmp_path)
    read = pd.read_parquet(tmp_path / "results.parquet")["x"]
    assert read[0] == 7 and pd.isna(read[1]) and pd.api.types.is_integer_dtype(read)
    plan = json.loads((tmp_path / "sweep.json").read_text())
    plan["runs"][1]["values"] = {"y": 1}
    (tmp_path / "sweep.json").write_text(json.dumps(plan))
    with pytest.raises(ValidationError, match="its runs have different parameters"):
        load_results(tmp_path)
    with pytest.raises(ValidationError, match="folder: got None"):
        load_results(None)

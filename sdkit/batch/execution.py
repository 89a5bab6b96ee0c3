"""One run: papermill in a folder of its own, which gets its place only when it is complete.

    runs/<run id>/       done: notebook.ipynb, run.json and, below output/, what the notebook wrote
    failed/<run id>/     as far as it came, with the error in run.json
    attempts/<run id>.*  being made, or left by something that was killed: never taken for done

An attempt has a name that no other has, so that even a kernel that nobody could stop writes where
nobody looks.
"""

import contextlib
import json
import os
import shutil
import threading
import time
import uuid
from dataclasses import dataclass
from pathlib import Path

import nbformat
from papermill.exceptions import PapermillExecutionError

from sdkit.batch.engine import describe_death, is_kernel_death, run_papermill
from sdkit.batch.kernels import make_manager_class, warm_zygote
from sdkit.batch.lock import is_held
from sdkit.batch.parameters import OUTPUT_NAME
from sdkit.batch.reading import save_reading

DONE, FAILED, DIED, TIMEOUT = "done", "failed", "kernel-died", "timeout"
STATUSES = (DONE, FAILED, DIED, TIMEOUT)
RECORD = {  # of a run, with the types that JSON gives back
    "status": (str,), "seconds": (int, float), "cpu_seconds": (int, float),
    "peak_memory_gib": (int, float), "attempts": (int,), "kernel": (str,), "error": (str,),
    "failed_cell": (int,), "failed_source": (str,),
}  # fmt: skip
RUN_NAME, NOTEBOOK_NAME, PAGE_NAME = "run.json", "notebook.ipynb", "notebook.html"
LOG_NAME = "kernel.log"
RUNS, FAILURES, ATTEMPTS = "runs", "failed", "attempts"
WATCH_SECONDS = 0.25
ERROR_LETTERS = 2000  # of a message, in the table; all of it is in the executed notebook


class SweepGone(RuntimeError):
    """The sweep that wanted this run is not there any more: nothing is to be kept of it."""


@dataclass(frozen=True)
class Task:
    """Everything that a worker needs to know of a run.

    Attributes:
        run_id: Its id.
        values: {name: value} for the notebook.
        notebook_json: The notebook.
        notebook_folder: Where it works.
        takes_output: Whether the notebook is told where to write.
        packages: What it imports that a kernel can have imported already.
        folder: The sweep's.
        token: What the sweep holds its folder with.
        timeout_seconds: For one attempt; None is no limit.
        retries: Further attempts after one that failed.
    """

    run_id: str
    values: dict
    notebook_json: str
    notebook_folder: str
    takes_output: bool
    packages: tuple[str, ...]
    folder: str
    token: str
    timeout_seconds: float | None
    retries: int


def execute_run(task):
    """Executes a run until it is done or out of attempts, and returns its status.

    Whoever of two comes second, after a scheduler has given the same run to two workers, finds the
    place taken and drops what it made.

    Raises:
        SweepGone: The sweep ended meanwhile.
    """
    folder = Path(task.folder)
    done = folder / RUNS / task.run_id
    for number in range(1, task.retries + 2):
        if done.is_dir():
            return DONE
        attempt = folder / ATTEMPTS / f"{task.run_id}.{uuid.uuid4().hex[:8]}"
        attempt.mkdir(parents=True)
        record = {"run_id": task.run_id, "attempts": number, **_attempt(task, attempt)}
        (attempt / RUN_NAME).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
        if not is_held(folder, task.token):
            raise SweepGone(f"{task.run_id}: the sweep that wanted it has ended.")
        # The page comes after: what is killed before this line was worked for in vain.
        save_missing_page(_put_in_place(attempt, folder, record["status"]))
        if record["status"] == DONE:
            break
    return record["status"]


def save_missing_page(folder):
    """Writes the executed notebook of a run as a page, where there is one and no page yet.

    One that was damaged since has none: a run counts by its record.
    """
    if (folder / NOTEBOOK_NAME).is_file() and not (folder / PAGE_NAME).is_file():
        with contextlib.suppress(ValueError, nbformat.ValidationError):
            save_reading(folder / NOTEBOOK_NAME, folder / PAGE_NAME)


def read_run(folder):
    """Returns what is known of a run in its folder, or None: not there, or damaged."""
    try:
        record = json.loads((folder / RUN_NAME).read_text(encoding="utf-8"))
        known = {name: record.get(name) for name in RECORD}
        is_whole = record["status"] in STATUSES and all(
            value is None or type(value) in RECORD[name] for name, value in known.items()
        )
        return known if is_whole else None
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        return None


def _attempt(task, attempt):
    """Executes the notebook once, and returns what happened as plain values."""
    zygote = warm_zygote(task.packages)
    zygote.wait_until_ready()
    manager_class, processes = make_manager_class(zygote, attempt / LOG_NAME)
    values = dict(task.values)
    if task.takes_output:
        values[OUTPUT_NAME] = str(attempt / "output")
    path, started, happened = attempt / NOTEBOOK_NAME, time.perf_counter(), {"status": DONE}
    with _Watch(task, processes) as watch:
        try:
            path.write_text(task.notebook_json, encoding="utf-8")
            executed = run_papermill(path, path, values, manager_class, task.notebook_folder)
            happened |= _find_early_end(executed.cells, task, values)
        except PapermillExecutionError as error:
            happened = {
                "status": FAILED,
                "error": _cut(f"{error.ename}: {error.evalue}"),
                **_describe_cell(error.cell_index, error.source, task, values),
            }
        except Exception as error:  # nbclient says in many ways that its kernel is gone
            if watch.stopped and processes:
                processes[-1].wait()  # it is being killed
            if not is_kernel_death(error, processes):
                raise
            is_late = watch.stopped == TIMEOUT
            happened = {
                "status": TIMEOUT if is_late else DIED,
                "error": f"stopped after {task.timeout_seconds:g} s, the limit"
                if is_late
                else describe_death(processes[-1].wait()),
                **_find_running_cell(path, task, values),
            }
    seconds = time.perf_counter() - started
    if watch.stopped == "gone" or zygote.is_closed:
        raise SweepGone(f"{task.run_id}: the sweep that wanted it has ended.")
    log = attempt / LOG_NAME
    if happened["status"] == DONE or (log.exists() and not log.stat().st_size):
        log.unlink(missing_ok=True)
    return {
        **happened,
        "seconds": seconds,
        **_find_usage(processes[-1]),
        "kernel": f"from nothing: {zygote.trouble}" if zygote.trouble else "forked",
    }


class _Watch:
    """Context manager: a thread that ends the kernel when its time is up or the sweep is gone.

    Attributes:
        stopped: TIMEOUT or "gone" if it did, else None.
    """

    def __init__(self, task, processes):
        self._task, self._processes = task, processes
        self._over, self.stopped = threading.Event(), None
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self):
        self._thread.start()
        return self

    def __exit__(self, *error):
        self._over.set()
        self._thread.join()

    def _watch(self):
        limit = self._task.timeout_seconds
        started = time.monotonic()
        while not self._over.wait(WATCH_SECONDS):
            if limit and time.monotonic() - started > limit:
                self.stopped = TIMEOUT
            elif not is_held(self._task.folder, self._task.token):
                self.stopped = "gone"
            if self.stopped and self._processes:
                self._processes[-1].kill()
                return


def _find_usage(process):
    """What a kernel took; one that was started from nothing does not tell."""
    process.wait()
    return getattr(process, "used", {})


def _find_running_cell(path, task, values):
    """Which cell was being executed, from the notebook as papermill has saved it so far.

    papermill calls all cells completed in the end, even those that a dead kernel never reached;
    only a cell that was begun has a time at which it was.
    """
    cells = nbformat.read(path, as_version=4).cells if path.is_file() else []
    for index, cell in reversed(list(enumerate(cells))):
        begun = cell.metadata.get("papermill", {}).get("start_time")
        if begun and cell.cell_type == "code":
            return _describe_cell(index, cell.source, task, values)
    return {}


def _find_early_end(cells, task, values):
    """`sys.exit(0)` is a success to papermill; that cells below it never ran is told."""
    for index, cell in enumerate(cells):
        ended = any(
            output.output_type == "error" and output.ename == "SystemExit"
            for output in cell.get("outputs", [])
        )
        if ended and any(below.cell_type == "code" for below in cells[index + 1 :]):
            told = "SystemExit: the notebook ended itself here; the cells below did not run"
            return {"error": told, **_describe_cell(index, cell.source, task, values)}
    return {}


def _cut(message):
    left_out = len(message) - ERROR_LETTERS
    return message if left_out <= 0 else f"{message[:ERROR_LETTERS]} ... ({left_out} letters more)"


def _describe_cell(index, source, task, values):
    """Counts as the source does, where papermill's own cell with the values is not.

    A notebook that papermill has executed before has such a cell already, which is replaced.
    """
    tags = [cell["metadata"].get("tags", []) for cell in json.loads(task.notebook_json)["cells"]]
    is_new = values and not any("injected-parameters" in each for each in tags)
    is_after = is_new and index > next(i for i, each in enumerate(tags) if "parameters" in each)
    return {"failed_cell": index - 1 if is_after else index, "failed_source": source}


def _put_in_place(attempt, folder, status):
    """Moves a complete attempt to where it belongs, whole, and returns that place.

    A run that is done stays done.
    """
    place = folder / (RUNS if status == DONE else FAILURES) / attempt.name.partition(".")[0]
    place.parent.mkdir(exist_ok=True)
    failed = folder / FAILURES / place.name
    if failed.is_dir():
        old = attempt.with_name(f"{attempt.name}.old")
        os.rename(failed, old)
        shutil.rmtree(old, ignore_errors=True)
    try:
        os.rename(attempt, place)
    except OSError:
        if not place.is_dir():
            raise
        shutil.rmtree(attempt, ignore_errors=True)
    return place

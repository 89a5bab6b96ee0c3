"""A sweep from beginning to end: plan, lock, run what is not done, and write down what came out."""

import json
import os
import shutil
import uuid
from pathlib import Path

from tqdm.auto import tqdm

from sdkit.batch.execution import (
    ATTEMPTS,
    DONE,
    FAILURES,
    RUN_NAME,
    RUNS,
    Task,
    read_run,
    save_missing_page,
)
from sdkit.batch.grid import BUNDLED, read_grid
from sdkit.batch.kernels import close_zygote, warm_zygote
from sdkit.batch.lock import lock_folder
from sdkit.batch.page import save_page
from sdkit.batch.parameters import read_notebook
from sdkit.batch.plan import find_packages, make_plan, save_plan
from sdkit.batch.results import load_results, save_results
from sdkit.batch.scheduling import (
    MOST_JOBS,
    check_workers,
    connect,
    count_cores,
    execute_tasks,
)
from sdkit.batch.sheet import save_sheet
from sdkit.run_folder import replace_file
from sdkit.validation import ValidationError, check_is_writable

SWEEPS_FOLDER = Path("runs/sweeps")


def run_sweep(
    notebook,
    grid,
    *,
    output=None,
    jobs=None,
    scheduler=None,
    force=False,
    retry=0,
    timeout=None,
    progress=True,
):
    """Runs a notebook for every combination of a grid, in parallel, and collects the results.

    Runs that are done are skipped, whatever ended the sweep that did them; one that failed is
    tried again. The others go on where one fails.

    Args:
        notebook: Its path, or the name of one in `sdkit/grids/`.
        grid: A YAML file, the name of one in `sdkit/grids/`, or a dict; see `sdkit.batch.grid`.
        output: Folder for runs, `results.csv`, `results.parquet`, `figure.png` and `index.html`;
            by default `runs/sweeps/<grid>`.
        jobs: Notebooks at a time; by default one a core, and at most 4. Each gets its share of the
            cores: a grid of one run has all. A device (MPS, CUDA) runs one at a time all the same.
        scheduler: Address of a Dask scheduler, instead of one in this process.
        force: Run again what is done.
        retry: Further attempts for a run that fails.
        timeout: Seconds for one attempt.
        progress: Show a progress bar.

    Returns:
        What `load_results` tells.

    Raises:
        ValidationError: The notebook, the grid, the folder or the scheduler cannot be used. Nothing
            has been started then.
    """
    _check_numbers(jobs, retry, timeout)
    notebook = _find_notebook(notebook)
    packages = find_packages(read_notebook(notebook))
    jobs = min(jobs or min(count_cores(), MOST_JOBS), len(read_grid(grid).expand()))
    if scheduler is None:
        warm_zygote(packages, max(1, count_cores() // jobs))  # while the plan is made
    try:
        plan = make_plan(notebook, grid, here=scheduler is None)
        folder = check_is_writable(Path(output or choose_folder(grid, notebook)).resolve())
        with lock_folder(folder) as token:
            save_plan(plan, folder)
            _clear(folder, plan, force)
            tasks = _list_tasks(plan, folder, token, timeout, retry)
            try:
                if tasks:
                    _execute(tasks, plan, folder, token, scheduler, jobs, progress)
            finally:
                close_zygote()  # before anything is written: nobody works on any more
                table = _write_results(folder)
                shutil.rmtree(folder / ATTEMPTS, ignore_errors=True)
    finally:
        close_zygote()
    return table


def _list_tasks(plan, folder, token, timeout, retry):
    """A Task for each run that is not done."""
    return [
        Task(
            run.run_id, run.values, plan.notebook_json, plan.notebook_folder, plan.takes_output,
            plan.packages, str(folder), token, timeout, retry,
        )
        for run in plan.runs
        if not (folder / RUNS / run.run_id).is_dir()
    ]  # fmt: skip


def _execute(tasks, plan, folder, token, scheduler, jobs, progress):
    total, done = len(plan.runs), len(plan.runs) - len(tasks)
    bar = tqdm(total=total, initial=done, desc=plan.notebook_name, unit="run", disable=not progress)
    backend_of = {run.run_id: run.backend for run in plan.runs}
    here = scheduler is None
    has_device = here and _has_device({backend_of[task.run_id] for task in tasks})
    with bar, connect(scheduler, jobs=jobs, has_device=has_device) as client:
        offered = has_device if here else check_workers(client, folder, token)
        needs = [_needs_accelerator(backend_of[task.run_id], offered) for task in tasks]
        failures = 0
        for task, status, error in execute_tasks(client, tasks, needs):
            if error:
                _save_failure(folder, task, status, error)
            failures += status != DONE
            bar.update()
            bar.set_postfix(failed=failures)


def _has_device(backends):
    """Whether runs here could share a device; where all say "cpu", nobody needs to look."""
    if backends == {"cpu"}:
        return False
    import torch

    return torch.backends.mps.is_available() or torch.cuda.is_available()


def _needs_accelerator(backend, offered):
    if backend in (None, "auto", "cpu"):
        return offered and backend != "cpu"
    if not offered:
        raise ValidationError(
            f"backend={backend!r}: no worker offers an accelerator. Start them with "
            "`dask worker ADDRESS --nthreads 1 --resources accelerator=1`."
        )
    return True


def _save_failure(folder, task, status, error):
    """Writes down what no worker could."""
    place = folder / FAILURES / task.run_id
    place.mkdir(parents=True, exist_ok=True)
    record = {"run_id": task.run_id, "status": status, "error": error}
    with replace_file(place / RUN_NAME) as temporary:
        temporary.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


def _write_results(folder):
    table = load_results(folder)
    for path in table["path"].dropna():
        save_missing_page(folder / path)  # of a run whose sweep was killed before it came to that
    save_results(table, folder)
    save_sheet(table, folder)
    save_page(table, folder)
    return table


def _clear(folder, plan, force):
    """Drops what was left half-made or is damaged, and with `force` what is done."""
    attempts = folder / ATTEMPTS
    attempts.mkdir(exist_ok=True)
    for run in plan.runs:
        done = folder / RUNS / run.run_id
        if done.is_dir() and (force or read_run(done) is None):
            os.rename(done, attempts / f"{run.run_id}.{uuid.uuid4().hex[:8]}")
    shutil.rmtree(attempts, ignore_errors=True)


def _find_notebook(notebook):
    """Returns the path of a notebook: a file, or one of the package by its name."""
    if not isinstance(notebook, (str, os.PathLike)):
        raise ValidationError(f"notebook: got {notebook!r:.80}, expected the path of a notebook.")
    bundled = BUNDLED / f"{Path(notebook).stem}.ipynb"
    is_bundled = len(Path(notebook).parts) == 1 and bundled.is_file()
    return bundled if is_bundled and not Path(notebook).exists() else Path(notebook)


def choose_folder(grid, notebook):
    """Returns where a sweep goes that is not told: below runs/sweeps, by the name of its grid."""
    return SWEEPS_FOLDER / Path(notebook if isinstance(grid, dict) else grid).stem


def _check_numbers(jobs, retry, timeout):
    for name, value, least in (("jobs", jobs, 1), ("retry", retry, 0), ("timeout", timeout, 0)):
        kinds, what = ((int, float), "") if name == "timeout" else ((int,), "a whole number, ")
        if value is not None and (type(value) not in kinds or not value >= least):
            raise ValidationError(f"{name}={value!r}: expected {what}{least} or more.")
    if timeout == 0:
        raise ValidationError("timeout=0: expected seconds, or nothing for no limit.")

"""`sdkit demo`: the notebooks through papermill, side by side, and what they found.

On a CPU each notebook has a core of its own and one thread on it: the bundled model's operations
are small, and two threads on a core that is busy wait for each other at every one of them.
"""

import json
import os
import shutil
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import nbformat
from papermill.exceptions import PapermillExecutionError

from sdkit.batch.engine import describe_death, is_kernel_death, run_papermill
from sdkit.batch.kernels import close_zygote, make_manager_class, warm_zygote
from sdkit.batch.plan import find_packages
from sdkit.batch.scheduling import MOST_JOBS, count_cores
from sdkit.demo_page import save_page, save_reading_with_figures
from sdkit.device import choose_device
from sdkit.run_folder import VERDICTS_NAME
from sdkit.validation import ValidationError, check_is_writable

HERE = Path(__file__).parent
NOTEBOOKS_FOLDERS = (HERE / "notebooks", HERE.parent / "notebooks")  # of a wheel, of a clone


@dataclass(frozen=True)
class NotebookRun:
    """One executed notebook.

    Attributes:
        name: Without ending.
        seconds: Wall time of the run, kernel start included.
        error: One line if it failed, else None.
        verdicts: What the notebook found, as `save_verdicts` wrote it.
    """

    name: str
    seconds: float
    error: str | None
    verdicts: tuple[dict, ...]

    @property
    def is_good(self) -> bool:
        """Whether it ran through and every verdict came out as the story tells it."""
        told = self.error is None and bool(self.verdicts)
        return told and all(verdict["as_expected"] for verdict in self.verdicts)


def find_notebooks() -> list[Path]:
    """The numbered notebooks of the first of our folders that has some, in order.

    Raises:
        ValidationError: There are none.
    """
    for folder in NOTEBOOKS_FOLDERS:
        if notebooks := sorted(folder.glob("[0-9][0-9]_*.ipynb")):
            return notebooks
    searched = ", ".join(map(str, NOTEBOOKS_FOLDERS))
    raise ValidationError(
        f"{searched}: found no notebook NN_*.ipynb, expected sdkit's own. "
        "Install sdkit again, from a clone or a wheel."
    )


def run_demo(
    output_folder: Path, *, parameters: dict | None = None, notebooks=None
) -> list[NotebookRun]:
    """Runs every notebook, keeps it executed as ipynb and HTML, and writes `index.html`.

    One a core at a time, at most 4; one at a time where they share a device (MPS, CUDA).

    Args:
        output_folder: For the executed notebooks and, in a folder each, what they write.
        parameters: For all notebooks, such as {"num_inference_steps": 10}.
        notebooks: Paths; by default the numbered notebooks of the repository.

    Returns:
        One NotebookRun each, in order; a failed notebook does not stop the others.

    Raises:
        ValidationError: The folder cannot be written to, or there are no notebooks.
    """
    output_folder = check_is_writable(Path(output_folder).resolve())
    notebooks = notebooks or find_notebooks()
    parameters = parameters or {}
    has_device = choose_device(parameters.get("backend", "auto"))[0].type != "cpu"
    jobs = 1 if has_device else min(count_cores(), MOST_JOBS, len(notebooks))
    packages = {
        name for path in notebooks for name in find_packages(nbformat.read(path, as_version=4))
    }
    warm_zygote(tuple(sorted(packages)), None if has_device else max(1, count_cores() // jobs))
    try:
        with ThreadPoolExecutor(jobs) as pool:
            try:
                # The longest text first, or the longest run would end alone, one core idle.
                waiting = {
                    path: pool.submit(run_notebook, path, output_folder, parameters, position)
                    for position, path in sorted(
                        enumerate(notebooks), key=lambda pair: -pair[1].stat().st_size
                    )
                }
                runs = [waiting[path].result() for path in notebooks]
            except BaseException:  # an interrupt, a full disk: what runs on would hold up the end
                pool.shutdown(wait=False, cancel_futures=True)
                close_zygote()
                raise
    finally:
        close_zygote()
    save_page(runs, output_folder)
    return runs


def run_notebook(path: Path, output_folder: Path, parameters: dict, position) -> NotebookRun:
    """Executes one notebook; it is named `<name>.ipynb` only if it ran through.

    Args:
        path: The notebook.
        output_folder: For it, and in a folder of its name for what it writes.
        parameters: For it, without its `output_folder`.
        position: Line of its progress bar.
    """
    name, started = path.stem, time.perf_counter()
    partial, executed = output_folder / f".{name}.part.ipynb", output_folder / f"{name}.ipynb"
    failed, log = output_folder / f"{name}.failed.ipynb", output_folder / f"{name}.failed.log"
    for stale in (executed, failed, log, executed.with_suffix(".html")):
        stale.unlink(missing_ok=True)
    shutil.rmtree(output_folder / name, ignore_errors=True)
    parameters = {**parameters, "output_folder": str(output_folder / name)}
    bar = {"desc": name, "position": position}
    error = execute(path, partial, parameters, log, bar)
    os.replace(partial, failed if error else executed)
    verdicts = ()
    if error is None:
        log.unlink(missing_ok=True)
        save_reading_with_figures(executed, output_folder / name / "figures")
        verdicts_path = output_folder / name / VERDICTS_NAME
        if verdicts_path.exists():
            verdicts = tuple(json.loads(verdicts_path.read_text("utf-8")))
    return NotebookRun(name, time.perf_counter() - started, error, verdicts)


def execute(path, executed, parameters, log, bar) -> str | None:
    """Runs a notebook on a warm kernel and returns its error in one line, or None."""
    zygote = warm_zygote(())
    zygote.wait_until_ready()
    manager_class, processes = make_manager_class(zygote, log)
    try:
        run_papermill(path, executed, parameters, manager_class, path.parent, progress_bar=bar)
    except PapermillExecutionError as failure:
        return f"cell {failure.exec_count}: {failure.ename}: {failure.evalue}"
    except Exception as error:  # nbclient says in many ways that its kernel is gone
        if zygote.is_closed or not is_kernel_death(error, processes):
            raise
        return describe_death(processes[-1].wait())
    return None


def format_table(runs: list[NotebookRun]) -> str:
    """The verdicts as aligned text: one line a question."""
    rows = [
        (
            run.name[:2],
            verdict["question"],
            verdict["answer"],
            "" if verdict["as_expected"] else "  UNEXPECTED",
        )
        for run in runs
        for verdict in run.verdicts
    ]
    rows += [
        (run.name[:2], "did it run through?", run.error or "it wrote no verdicts", "  FAILED")
        for run in runs
        if run.error or not run.verdicts
    ]
    width = max((len(question) for _, question, _, _ in rows), default=0)
    return "\n".join(
        f"{number}  {question:<{width}}  {answer}{mark}" for number, question, answer, mark in rows
    )

"""`sdkit demo`: the notebooks in order through papermill, one verdict table, one page."""

import base64
import html
import json
import os
import shutil
import time
from dataclasses import dataclass
from pathlib import Path

import papermill
from nbclient.exceptions import DeadKernelError
from nbconvert import HTMLExporter
from papermill.exceptions import PapermillExecutionError

from sdkit.run_folder import VERDICTS_NAME, replace_file
from sdkit.validation import ValidationError

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


def find_notebooks(folders=NOTEBOOKS_FOLDERS) -> list[Path]:
    """The numbered notebooks of the first folder that has some, in order.

    Raises:
        ValidationError: There are none.
    """
    for folder in folders:
        if notebooks := sorted(folder.glob("[0-9][0-9]_*.ipynb")):
            return notebooks
    raise ValidationError(
        f"{', '.join(map(str, folders))}: found no notebook NN_*.ipynb, expected sdkit's own. "
        "Install sdkit again, from a clone or a wheel."
    )


def run_demo(
    output_folder: Path, *, parameters: dict | None = None, notebooks=None
) -> list[NotebookRun]:
    """Runs every notebook, keeps it executed as ipynb and HTML, and writes `index.html`.

    Args:
        output_folder: For the executed notebooks and, in a folder each, what they write.
        parameters: For all notebooks, such as {"num_inference_steps": 10}.
        notebooks: Paths; by default the numbered notebooks of the repository.

    Returns:
        One NotebookRun each; a failed notebook does not stop the others.
    """
    output_folder = Path(output_folder).resolve()
    output_folder.mkdir(parents=True, exist_ok=True)
    runs = [
        run_notebook(path, output_folder, parameters or {})
        for path in notebooks or find_notebooks()
    ]
    write_index(runs, output_folder)
    return runs


def run_notebook(path: Path, output_folder: Path, parameters: dict) -> NotebookRun:
    """Executes one notebook; it is named `<name>.ipynb` only if it ran through."""
    name, started = path.stem, time.perf_counter()
    partial, executed = output_folder / f".{name}.part.ipynb", output_folder / f"{name}.ipynb"
    failed = output_folder / f"{name}.failed.ipynb"
    for stale in (executed, failed, executed.with_suffix(".html")):
        stale.unlink(missing_ok=True)
    shutil.rmtree(output_folder / name, ignore_errors=True)
    parameters = {**parameters, "output_folder": str(output_folder / name)}
    error = None
    try:
        papermill.execute_notebook(path, partial, parameters=parameters, cwd=path.parent)
    except PapermillExecutionError as failure:
        error = f"cell {failure.exec_count}: {failure.ename}: {failure.evalue}"
    except DeadKernelError:
        error = "the kernel died, as it does when memory runs out"
    os.replace(partial, failed if error else executed)
    if error is None:
        export_html(executed, output_folder / name / "figures")
    verdicts_path = output_folder / name / VERDICTS_NAME
    verdicts = (
        json.loads(verdicts_path.read_text("utf-8"))
        if error is None and verdicts_path.exists()
        else []
    )
    return NotebookRun(name, time.perf_counter() - started, error, tuple(verdicts))


def export_html(executed: Path, figures_folder: Path) -> Path:
    """Writes the notebook as one self-contained page, its reference figure the run's own."""
    page, _ = HTMLExporter(template_name="lab").from_filename(str(executed))
    for figure in figures_folder.glob("*.png"):
        page = page.replace(f"../figures/{figure.name}", embed(figure))
    path = executed.with_suffix(".html")
    with replace_file(path) as temporary:
        temporary.write_text(page, encoding="utf-8")
    return path


def embed(figure: Path) -> str:
    return f"data:image/png;base64,{base64.b64encode(figure.read_bytes()).decode()}"


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


def write_index(runs: list[NotebookRun], output_folder: Path) -> Path:
    """One self-contained page: verdicts, figures, links to the executed notebooks."""
    sections = "\n".join(section_of(run, output_folder) for run in runs)
    page = PAGE.replace("{sections}", sections)
    path = output_folder / "index.html"
    with replace_file(path) as temporary:
        temporary.write_text(page, encoding="utf-8")
    return path


def section_of(run: NotebookRun, output_folder: Path) -> str:
    title = html.escape(run.name[3:].replace("_", " ").capitalize())
    if run.error:
        return f'<section><h2>{title}</h2><p class="bad">{html.escape(run.error)}</p></section>'
    rows = "".join(
        f"<tr><td>{html.escape(v['question'])}</td>"
        f'<td class="{"good" if v["as_expected"] else "bad"}">{html.escape(v["answer"])}</td>'
        f"<td>{html.escape(v['evidence'])}</td></tr>"
        for v in run.verdicts
    )
    figures = "".join(
        f'<img alt="{html.escape(figure.stem.replace("_", " "))}" src="{embed(figure)}">'
        for figure in sorted((output_folder / run.name / "figures").glob("*.png"))
    )
    return (
        f"<section><h2>{title}</h2>"
        f"<table><tr><th>Question</th><th>Answer</th><th>Evidence</th></tr>{rows}</table>"
        f'{figures}<p><a href="{run.name}.html">The executed notebook</a>, '
        f"{run.seconds:.0f} s</p></section>"
    )


PAGE = """<!doctype html>
<html lang="en"><meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>sdkit demo</title>
<style>
:root { color-scheme: light dark; }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto;
  padding: 0 1rem; }
table { border-collapse: collapse; width: 100%; display: block; overflow-x: auto; }
th, td { text-align: left; padding: .4rem .8rem .4rem 0; border-bottom: 1px solid #8884;
  vertical-align: top; }
img { max-width: 100%; height: auto; margin: 1rem 0; background: white; border-radius: .4rem; }
.good { color: #1b7f5c; font-weight: 600; } .bad { color: #c81e1e; font-weight: 600; }
</style>
<h1>Black images: the cause, the cure, the proof</h1>
<p>Three prompts, three black images, one ignored warning, and a script that reported success.
What follows was run on this machine a moment ago; where Apple's MPS backend was emulated,
it says so.</p>
{sections}
</html>
"""

"""`sdkit demo` with light notebooks: odd folders, kernels that die, disks that are full."""

import json
import resource

import pytest
from sweep_notebooks import write_behaving, write_notebook
from typer.testing import CliRunner

import sdkit.demo
from sdkit.cli import app
from sdkit.demo import run_demo
from sdkit.validation import ValidationError

VERDICTS = """
import json, pathlib
folder = pathlib.Path(output_folder)
folder.mkdir()
told = {"question": "Is it?", "answer": "It is", "evidence": "seen", "as_expected": good}
(folder / "verdicts.json").write_text(json.dumps([told]))
"""


def write_telling(path, *, good=True):
    return write_notebook(path, f'good: bool = {good}\noutput_folder: str = ""', VERDICTS)


def test_a_folder_with_braces_is_a_folder(tmp_path):
    """papermill formats the paths that it is given."""
    folder = tmp_path / "{a} {0} b{"
    folder.mkdir()
    notebook = write_telling(folder / "01_tell.ipynb")
    (run,) = run_demo(folder / "out", notebooks=[notebook])
    assert run.is_good and run.error is None
    assert sorted(path.name for path in (folder / "out").iterdir()) == [
        "01_tell", "01_tell.html", "01_tell.ipynb", "index.html",
    ]  # fmt: skip


def test_how_a_kernel_died_is_told(tmp_path):
    notebook = write_behaving(tmp_path / "01_die.ipynb", tmp_path)
    (run,) = run_demo(tmp_path / "out", parameters={"mode": "exit"}, notebooks=[notebook])
    assert run.error == "the kernel ended by itself (exit code 3)" and not run.is_good
    assert (tmp_path / "out" / "01_die.failed.ipynb").is_file()


def test_a_full_disk_is_not_a_dead_kernel(tmp_path):
    """The limit for one file stands in for a full disk: papermill cannot save its cells."""
    notebook = write_notebook(tmp_path / "01_long.ipynb", "x: int = 1", "print('x' * 400_000)")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, hard))
    try:
        with pytest.raises(OSError, match="File too large"):
            run_demo(tmp_path / "out", notebooks=[notebook])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert not (tmp_path / "out" / "index.html").exists()


@pytest.mark.parametrize(("good", "code"), [(True, 0), (False, 1)])
def test_json_alone_is_on_stdout(tmp_path, monkeypatch, good, code):
    write_telling(tmp_path / "01_tell.ipynb", good=good)
    monkeypatch.setattr(sdkit.demo, "NOTEBOOKS_FOLDERS", (tmp_path,))
    result = CliRunner().invoke(app, ["demo", "--output", str(tmp_path / "out"), "--json"])
    assert result.exit_code == code, result.output
    (told,) = json.loads(result.stdout)
    assert told["name"] == "01_tell" and told["verdicts"][0]["as_expected"] is good


def test_a_folder_that_cannot_be_written_to_is_refused_before_anything_runs(tmp_path):
    """Where the system's own folder is, root cannot write either."""
    notebook = write_telling(tmp_path / "01_tell.ipynb")
    with pytest.raises(ValidationError, match="cannot be written to"):
        run_demo("/proc/self", notebooks=[notebook])

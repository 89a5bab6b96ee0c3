"""Notebooks for the tests of sweeps, made here: light ones, and one for each way to fail."""

import nbformat

BEHAVIOUR = """
import os, pathlib, time
if mode == "raise":
    raise ValueError("planted")
if mode == "die":
    os.kill(os.getpid(), 9)
if mode == "exit":
    os._exit(3)
if mode == "hang":
    time.sleep(600)
if mode == "once":  # fails, but not the second time
    flag = pathlib.Path(marks) / "tried"
    if not flag.exists():
        flag.touch()
        raise RuntimeError("not yet")
"""
RESULTS = """
import json
folder = pathlib.Path(output_folder)
folder.mkdir(parents=True)
(folder / "metrics.json").write_text(json.dumps({"half": number / 2}))
"""
# Each start and each end leaves a letter in a file of its own: nothing may run twice unseen.
SLOW = """
import pathlib, time
mark = pathlib.Path(marks) / f"run_{number}"
mark.open("a").write("s")
time.sleep(seconds)
mark.open("a").write("e")
"""


def write_notebook(path, parameters, *cells, language="python"):
    """A notebook with a title, a parameters cell (none if it is None) and code cells."""
    notebook = nbformat.v4.new_notebook(
        metadata={
            "kernelspec": {"name": "python3", "display_name": "Python 3", "language": language},
            "language_info": {"name": language},
        }
    )
    notebook.cells = [nbformat.v4.new_markdown_cell("# A notebook")]
    if parameters is not None:
        tagged = {"tags": ["parameters"]}
        notebook.cells.append(nbformat.v4.new_code_cell(parameters, metadata=tagged))
    notebook.cells += [nbformat.v4.new_code_cell(cell.strip()) for cell in cells]
    nbformat.write(notebook, path)
    return path


def write_behaving(path, marks, *more):
    """One that does what its `mode` says, and leaves half of its `number`."""
    parameters = (
        f'number: float = 1.0\nmode: str = "ok"\nmarks: str = {str(marks)!r}\n'
        'output_folder: str = "nowhere"'
    )
    return write_notebook(path, parameters, BEHAVIOUR, RESULTS, *more)


def write_slow(path, marks, seconds):
    """One that leaves "s" where it starts and "e" where it ends, below `marks`."""
    parameters = f"number: int = 1\nmarks: str = {str(marks)!r}\nseconds: float = {seconds}"
    return write_notebook(path, parameters, SLOW)

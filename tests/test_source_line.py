"""The line that ran an op is somebody's own: a file's, a cell's, what was typed; not torch's."""

from pathlib import Path

import pytest
import torch
from IPython.core.interactiveshell import InteractiveShell

import sdkit
from sdkit.diagnosis.trace import find_first_bad_op

DIVISION = "def spoil(module, args, output):\n    return output * 0 / 0\n"


def find_source_of(spoil):
    """("where", "line") of the op that a hook spoils a linear layer with."""
    model = torch.nn.Linear(2, 2)
    model.register_forward_hook(spoil)
    with torch.no_grad():
        found = find_first_bad_op(lambda: model(torch.ones(1, 2)), {"unet": model})
    return found.source, found.source_line


def define_in(file_name):
    """The hook, as if that file held it."""
    names = {}
    exec(compile(DIVISION, file_name, "exec"), names)
    return names["spoil"]


@pytest.mark.parametrize(
    ("file_name", "shown"),
    [
        ("<stdin>", "<stdin>"),
        ("<string>", "<string>"),
        ("<python-input-3>", "<python-input-3>"),
        ("<ipython-input-3-0a1b>", "<ipython-input-3-0a1b>"),
        (f"{Path(torch.__file__).parent}vision/models.py", "models.py"),
        (f"{Path(sdkit.__file__).parent}_of_mine/layers.py", "layers.py"),
        ("/home/me/my_contextlib.py", "my_contextlib.py"),
    ],
)
def test_what_is_not_torchs_is_somebodys(file_name, shown):
    assert find_source_of(define_in(file_name)) == (f"{shown}:2 in spoil", None)


@pytest.mark.parametrize(
    "file_name",
    [
        f"{Path(torch.__file__).parent}/nn/functional.py",
        f"{Path(sdkit.__file__).parent}/guarding.py",
        "<frozen runpy>",
        "<eval_with_key>.3",
    ],
)
def test_torch_and_what_a_program_made_are_passed_over(file_name):
    where, line = find_source_of(define_in(file_name))
    assert where.startswith("test_source_line.py") and "find_first_bad_op" in line


def test_a_notebook_cell_is_named_with_its_line():
    shell = InteractiveShell.instance()
    try:
        shell.run_cell("pass", store_history=True)
        shell.run_cell(DIVISION, store_history=True)
        found = find_source_of(shell.user_ns["spoil"])
    finally:
        InteractiveShell.clear_instance()
    assert found == ("cell In[2]:2 in spoil", "return output * 0 / 0")

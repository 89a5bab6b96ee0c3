"""Whose code did it: the line that ran an op, outside torch and sdkit, and the hooks of others."""

import contextlib
import linecache
import os
import re
import sys
from pathlib import Path

import torch

SKIPPED_FOLDERS = tuple(
    f"{folder}{os.sep}" for folder in (Path(torch.__file__).parent, Path(__file__).parent.parent)
)
# What people typed has no file either: an interactive Python, IPython, `python -c`.
TYPED = re.compile(r"<(stdin|string|i?python-input-.*)>")


def find_source() -> tuple[str | None, str | None]:
    """("file.py:12 in function", the line); in a notebook ("cell In[3]:12 in function", the line).

    A line that was typed into Python below 3.13 is known by its number alone.
    """
    frame = sys._getframe(1)
    while frame:
        path = frame.f_code.co_filename
        if is_somebodys(path):
            line = linecache.getline(path, frame.f_lineno).strip() or None
            return f"{name_file(path)}:{frame.f_lineno} in {frame.f_code.co_name}", line
        frame = frame.f_back
    return None, None


def name_hooks(module) -> tuple[str, ...]:
    """("spoil (own.py:12)", ...): what others than sdkit and torch hooked to a module's forward."""
    hooks = [*module._forward_pre_hooks.values(), *module._forward_hooks.values()]
    codes = [(hook, getattr(hook, "__code__", None)) for hook in hooks]
    return tuple(
        f"{hook.__name__} ({name_file(code.co_filename)}:{code.co_firstlineno})"
        if code
        else type(hook).__name__
        for hook, code in codes
        if not code or is_somebodys(code.co_filename)
    )


def is_somebodys(path: str) -> bool:
    """Whether code of this file name is neither torch's nor ours, nor made by a program."""
    if path.startswith("<"):
        return bool(TYPED.fullmatch(path))
    return not path.startswith(SKIPPED_FOLDERS) and path != contextlib.__file__


def name_file(path: str) -> str:
    """A file's name; what IPython calls a cell, whose file is a number in a temporary folder."""
    ipython = sys.modules.get("IPython")
    shell = ipython and ipython.get_ipython()
    cell = shell and shell.compile.format_code_name(path)
    return " ".join(cell).lower().replace("in[", "In[") if cell else Path(path).name

"""papermill on a kernel of ours: one call for sweeps and for the demo, and how a kernel ended."""

import logging
import signal

import papermill

from sdkit.run_folder import DISK_ERRORS

START_SECONDS = 120  # for a kernel to answer, on a machine that is busy
# A kernel that dies is told by who asked for it, not between the progress bar's lines.
logging.getLogger("papermill").addHandler(logging.NullHandler())


def run_papermill(notebook, executed, parameters, manager_class, folder, *, progress_bar=False):
    """Executes a notebook on a kernel of ours, and saves it after each cell.

    Args:
        notebook: Its path.
        executed: Where to save it; may be the same.
        parameters: {name: value}.
        manager_class: Of `make_manager_class`.
        folder: Where the kernel works.
        progress_bar: False, or what tqdm takes.

    Returns:
        The executed notebook, of nbformat.
    """
    # papermill formats its paths as Python does.
    paths = [str(path).replace("{", "{{").replace("}", "}}") for path in (notebook, executed)]
    return papermill.execute_notebook(
        *paths,
        parameters=parameters,
        progress_bar=progress_bar,
        # Whatever kernel a notebook names or leaves out: it runs in this Python.
        kernel_name="python3",
        language="python",
        kernel_manager_class=manager_class,
        # Not cwd=: that would move this whole process, and other runs are in its threads.
        resources={"metadata": {"path": str(folder)}},
        start_timeout=START_SECONDS,
    )


def is_kernel_death(error, processes) -> bool:
    """Whether an error of `run_papermill` means that the kernel has ended, and nothing else.

    After a full disk papermill ends the kernel too.
    """
    is_dead = bool(processes) and processes[-1].poll() is not None
    return is_dead and getattr(error, "errno", None) not in DISK_ERRORS


def describe_death(exit_code) -> str:
    """How a kernel ended, in a few words."""
    if exit_code == -signal.SIGKILL:
        return "the kernel was killed from outside, as the system does when memory runs out"
    if exit_code < 0:
        return f"the kernel crashed ({signal.Signals(-exit_code).name})"
    return f"the kernel ended by itself (exit code {exit_code})"

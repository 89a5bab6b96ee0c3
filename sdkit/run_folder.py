"""Files and folders that appear whole: a run that fails leaves nothing that looks done."""

import errno
import json
import os
import shutil
from contextlib import contextmanager
from pathlib import Path

PARTIAL_ENDING = ".partial"
VERDICTS_NAME = "verdicts.json"
METRICS_NAME = "metrics.json"
DISK_ERRORS = (  # what a disk says that takes no more
    errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO,
)  # fmt: skip


@contextmanager
def replace_file(path):
    """Yields a temporary path in the same folder, and moves it to `path` if the block succeeds."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def begin_run(output_folder) -> Path:
    """Makes an empty folder beside `output_folder` to work in; what an earlier failure left goes.

    Args:
        output_folder: Where the finished run shall be.

    Returns:
        `<output_folder>.partial`, empty.
    """
    output_folder = Path(output_folder)
    partial = output_folder.with_name(output_folder.name + PARTIAL_ENDING)
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    return partial


def finish_run(partial: Path) -> Path:
    """Moves the finished folder to its place, over the run that was there before.

    Args:
        partial: What `begin_run` returned.

    Returns:
        The final folder.
    """
    final = partial.with_name(partial.name.removesuffix(PARTIAL_ENDING))
    previous = final.with_name(final.name + ".previous")
    shutil.rmtree(previous, ignore_errors=True)
    if final.exists():
        os.replace(final, previous)
    os.replace(partial, final)
    shutil.rmtree(previous, ignore_errors=True)
    return final


def save_verdicts(verdicts: list[dict], folder: Path) -> Path:
    """Writes a notebook's verdicts for the table of `sdkit demo`.

    Args:
        verdicts: Dicts of `question`, `answer`, `evidence` (str) and `as_expected` (bool).
        folder: The run's folder.
    """
    path = Path(folder) / VERDICTS_NAME
    with replace_file(path) as temporary:
        text = json.dumps(verdicts, indent=2, ensure_ascii=False)
        temporary.write_text(text + "\n", encoding="utf-8")
    return path


def save_metrics(metrics: dict[str, float | None], folder: Path) -> Path:
    """Writes a notebook's numbers for the table of `sdkit sweep`, one column each.

    Args:
        metrics: {name with its unit: number}; None where there is none.
        folder: The run's folder.
    """
    path = Path(folder) / METRICS_NAME
    with replace_file(path) as temporary:
        temporary.write_text(json.dumps(metrics, indent=2, allow_nan=False) + "\n", "utf-8")
    return path

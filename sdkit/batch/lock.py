"""One sweep at a time works in a folder, and whoever works for it can tell when it is gone."""

import fcntl
import json
import os
import time
import uuid
from contextlib import contextmanager
from pathlib import Path

from sdkit.validation import ValidationError

LOCK_NAME = ".lock"
PATIENCE_SECONDS = 2  # somebody who asks `is_held` has it for an instant


@contextmanager
def lock_folder(folder):
    """Holds a folder for one sweep, and yields a token; the system lets go of it with the process.

    Raises:
        ValidationError: Another sweep has it.
    """
    path = Path(folder) / LOCK_NAME
    with path.open("a+", encoding="utf-8") as opened:
        give_up = time.monotonic() + PATIENCE_SECONDS
        while not _try_lock(opened, fcntl.LOCK_EX):
            if time.monotonic() > give_up:
                holder = _read(path)
                raise ValidationError(
                    f"{folder}: another sweep is at work here (process {holder.get('process')}). "
                    "Wait for it, stop it, or give another --output."
                )
            time.sleep(0.05)
        token = uuid.uuid4().hex
        opened.truncate(0)
        opened.write(json.dumps({"token": token, "process": os.getpid()}))
        opened.flush()
        yield token


def is_held(folder, token):
    """Whether the sweep that got this token from `lock_folder` is still at work."""
    path = Path(folder) / LOCK_NAME
    if _read(path).get("token") != token:
        return False
    with path.open(encoding="utf-8") as opened:
        return not _try_lock(opened, fcntl.LOCK_SH)  # closing it lets go again


def _read(path):
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}  # gone, or being written


def _try_lock(opened, kind):
    try:
        fcntl.flock(opened, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True

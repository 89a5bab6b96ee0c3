"""Checkpoints: whole or not there at all, checked on the way in and on the way out, and few.

    run/checkpoints/step_00000050/pytorch_lora_weights.safetensors   the adapter, ready to use
                                  optimizer.pt                       AdamW's moments
                                  checkpoint.json                    progress, and checksums of both

A folder is made under another name and moved into place when all is in it, so a process that is
killed leaves the checkpoints that it had. What stands at the right place and is not right is
damaged: that is an error, never a reason to start afresh.
"""

import contextlib
import hashlib
import io
import json
import os
import shutil
from pathlib import Path

import torch

from sdkit.run_folder import DISK_ERRORS
from sdkit.validation import ValidationError

FOLDER_NAME = "checkpoints"
ADAPTER_FILE = "pytorch_lora_weights.safetensors"
OPTIMIZER_FILE = "optimizer.pt"
RECORD_FILE = "checkpoint.json"
PARTIAL_ENDING = ".partial"


@contextlib.contextmanager
def explain_disk_errors(run_folder):
    """Inside, what a disk refuses is told with what is kept and how to go on.

    Raises:
        ValidationError: Instead of an OSError of a disk; those of a network go through.
    """
    try:
        yield
    except OSError as error:
        if error.errno not in DISK_ERRORS:
            raise
        kept = list_checkpoints(run_folder)
        raise ValidationError(
            f"{error.filename or run_folder}: cannot be used ({error.strerror}). Expected room and "
            f"permission to write. {_say_what_is_kept(kept, run_folder)}"
        ) from error


def save_checkpoint(
    run_folder, progress: dict, adapter_bytes: bytes, optimizer_state: dict
) -> Path:
    """Writes a checkpoint.

    Args:
        run_folder: Of the training.
        progress: What else the run must know to go on, JSON types, with its "step".
        adapter_bytes: The adapter's file.
        optimizer_state: Of the optimiser.

    Returns:
        Its folder.

    Raises:
        ValidationError: It cannot be written; the earlier ones are as they were.
    """
    buffer = io.BytesIO()
    torch.save(optimizer_state, buffer)
    # Bytes are written rather than tensors: the libraries' own writers hide why a disk refused.
    files = {ADAPTER_FILE: adapter_bytes, OPTIMIZER_FILE: buffer.getvalue()}
    record = {**progress, "sha256": {name: _hash(content) for name, content in files.items()}}
    text = json.dumps(record)
    files[RECORD_FILE] = json.dumps({"sha256": _hash(text.encode()), "record": text}).encode()
    folder = Path(run_folder) / FOLDER_NAME / f"step_{progress['step']:08d}"
    partial = folder.with_name(folder.name + PARTIAL_ENDING)
    try:
        remove_folder(partial)
        partial.mkdir(parents=True)
        for name, content in files.items():
            (partial / name).write_bytes(content)
        os.replace(partial, folder)
    except OSError as error:
        with contextlib.suppress(OSError):  # the first error tells more
            remove_folder(partial)
        kept = list_checkpoints(run_folder)
        raise ValidationError(
            f"{folder}: cannot be written ({error.strerror or error}). Expected room and "
            f"permission to write. {_say_what_is_kept(kept, run_folder)}"
        ) from error
    return folder


def load_checkpoint(folder) -> tuple:
    """Reads a checkpoint.

    Args:
        folder: Of the checkpoint.

    Returns:
        (progress, adapter's bytes, optimizer_state).

    Raises:
        ValidationError: A file is missing, or is not what was written.
    """
    folder = Path(folder)
    outer = _read_record(folder, _read(folder / RECORD_FILE))
    record = json.loads(outer)
    contents = {name: _read(folder / name) for name in (ADAPTER_FILE, OPTIMIZER_FILE)}
    for name, content in contents.items():
        if _hash(content) != record["sha256"][name]:
            raise _damaged(folder / name)
    state = torch.load(io.BytesIO(contents[OPTIMIZER_FILE]), weights_only=True, map_location="cpu")
    return record, contents[ADAPTER_FILE], state


def find_last_checkpoint(run_folder) -> Path:
    """Returns the folder of the checkpoint to resume from.

    Raises:
        ValidationError: There is none.
    """
    found = list_checkpoints(run_folder)
    if not found:
        raise ValidationError(
            f"{Path(run_folder) / FOLDER_NAME}: no checkpoint there. Expected one to resume from; "
            "to begin anew, train into another folder."
        )
    return found[-1]


def find_checkpoint(run_folder, step):
    """Returns the folder of the finished checkpoint of a step, or None."""
    folder = Path(run_folder) / FOLDER_NAME / f"step_{step:08d}"
    return folder if folder.exists() else None


def list_checkpoints(run_folder) -> list:
    """Returns the folders of the finished checkpoints, oldest first."""
    return list_steps(Path(run_folder) / FOLDER_NAME)


def list_steps(folder) -> list:
    """Returns the folders in it that are named by a step; somebody's copies are not."""
    found = Path(folder).glob("step_*")
    return sorted(path for path in found if path.name.removeprefix("step_").isdecimal())


def prune_checkpoints(run_folder, limit, *, spare=()):
    """Removes all but the newest `limit` checkpoints, and what a killed process left half done.

    Args:
        run_folder: Of the training.
        limit: How many are kept; None keeps all.
        spare: Steps of checkpoints that stay.
    """
    for leftover in (Path(run_folder) / FOLDER_NAME).glob(f"*{PARTIAL_ENDING}"):
        shutil.rmtree(leftover)
    for leftover in Path(run_folder).glob(".*.part"):
        leftover.unlink()
    for folder in list_checkpoints(run_folder)[: -limit if limit else 0]:
        if int(folder.name.removeprefix("step_")) not in spare:
            remove_folder(folder)


def remove_folder(folder):
    """Removes a folder that is there; killed half way, it leaves nothing that looks whole."""
    if folder.exists() and folder.suffix != PARTIAL_ENDING:
        leaving = folder.with_name(folder.name + ".old" + PARTIAL_ENDING)
        shutil.rmtree(leaving, ignore_errors=True)
        os.replace(folder, leaving)
        folder = leaving
    if folder.exists():
        shutil.rmtree(folder)


def _hash(content):
    return hashlib.sha256(content).hexdigest()


def _read(path):
    try:
        return path.read_bytes()
    except OSError as error:
        raise ValidationError(
            f"{path}: cannot be read ({error.strerror}). Expected a whole checkpoint. "
            + _say_what_to_do(path.parent)
        ) from error


def _read_record(folder, content):
    try:
        outer = json.loads(content)
        if _hash(outer["record"].encode()) == outer["sha256"]:
            return outer["record"]
    except (ValueError, KeyError, TypeError, AttributeError):
        pass
    raise _damaged(folder / RECORD_FILE)


def _damaged(path):
    return ValidationError(
        f"{path}: is damaged, its checksum is not the one that was written. Expected a whole "
        f"checkpoint. {_say_what_to_do(path.parent)}"
    )


def _say_what_to_do(folder):
    earlier = [path for path in list_checkpoints(folder.parent.parent) if path < folder]
    if not earlier:
        return "It is the oldest one kept; train again into another folder."
    return f"Remove the folder {folder} to resume from {earlier[-1].name} before it."


def _say_what_is_kept(kept, run_folder):
    if not kept:
        return "No checkpoint was there before."
    return (
        f"The last good checkpoint is {kept[-1]}: make room, and go on from it with "
        f"sdkit train --resume {run_folder}."
    )

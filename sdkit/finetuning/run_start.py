"""Where a run begins: in an empty folder, or at the last checkpoint of one that was stopped."""

import shutil
from pathlib import Path

from sdkit.finetuning.checkpoints import (
    ADAPTER_FILE,
    FOLDER_NAME,
    find_last_checkpoint,
    list_steps,
)
from sdkit.finetuning.config import LoRAConfig, read_settings
from sdkit.finetuning.report import REPORT_FILE
from sdkit.validation import ValidationError, check_is_writable

CONFIG_FILE = "config.yaml"
IMAGES_NAME = "validation_images"


def find_start(config: LoRAConfig, *, resume, overwrite):
    """Returns the checkpoint to resume from, or None for a new run.

    Raises:
        ValidationError: There is no run to resume, or something would be lost.
    """
    folder = Path(config.output_folder)
    is_run = (folder / CONFIG_FILE).exists()
    if resume and overwrite:
        raise ValidationError(
            f"{folder}: to be resumed and overwritten. Expected one of the two alone."
        )
    if resume and not is_run:
        raise ValidationError(
            f"{folder}: no training to resume there. Expected {CONFIG_FILE} and {FOLDER_NAME}; "
            "start one without resume."
        )
    if resume:
        _check_same_settings(config, folder / CONFIG_FILE)
        check_is_writable(folder)
        return find_last_checkpoint(folder)
    if (is_run or (folder / ADAPTER_FILE).exists()) and not overwrite:
        raise ValidationError(
            f"{folder}: a training is there already. Resume it, overwrite it, or choose another "
            "output_folder."
        )
    check_is_writable(folder)
    return None


def _check_same_settings(config, path):
    saved, asked = LoRAConfig.from_dict(read_settings(path)).to_dict(), config.to_dict()
    # The folder may have been moved, and pictures of the run are looked at wherever they are.
    for name in saved:
        if not name.endswith("_folder") and saved[name] != asked[name]:
            raise ValidationError(
                f"{name}={asked[name]!r}: the run was begun with {saved[name]!r}, and a resumed "
                "run must end where the uninterrupted one would. Leave it, or train anew into "
                "another folder."
            )


def clear_run_folder(folder):
    """Removes what an earlier run, or one that never got going, left in a folder."""
    for name in (CONFIG_FILE, ADAPTER_FILE, REPORT_FILE):  # the first makes it a run
        (folder / name).unlink(missing_ok=True)
    for name in (FOLDER_NAME, IMAGES_NAME):
        for leftover in list_steps(folder / name):
            shutil.rmtree(leftover)

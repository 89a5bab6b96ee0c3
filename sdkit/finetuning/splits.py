"""Which files are for training, which are held out: folders that say so, or a seeded draw."""

import hashlib
from pathlib import Path

from sdkit.validation import ValidationError

SPLITS = ("train", "validation", "test")
FOLDER_NAMES = {
    "train": ("train", "training"),
    "validation": ("validation", "val", "valid"),
    "test": ("test", "testing"),
}
HELD_OUT_SHARE = 0.15  # for validation, and as much for the test, as the report's project has it
SPLIT_SEED = 42


def check_split(split) -> str:
    """Returns the name of a split.

    Raises:
        ValidationError: There is none of this name.
    """
    if split not in SPLITS:
        raise ValidationError(f"split={split!r}: expected one of {', '.join(SPLITS)}.")
    return split


def find_split_folder(folder, split):
    """Returns the folder of a split, or None if the data set is not split into folders.

    Raises:
        ValidationError: It is, but this one is missing.
    """
    found = {
        name: next((Path(folder, n) for n in names if Path(folder, n).is_dir()), None)
        for name, names in FOLDER_NAMES.items()
    }
    if found["train"] and not found[split]:
        there = ", ".join(path.name for path in found.values() if path)
        hint = ", or train with validation_steps=None" if split == "validation" else ""
        raise ValidationError(
            f"{folder}: has {there}, but no folder {split}. Add it{hint}; or put all images into "
            "one folder, which is then split by a seed."
        )
    return found[split] if found["train"] else None


def draw_split(names, split, *, seed=SPLIT_SEED) -> list:
    """Returns the names of one split, in their order: 70 % train, 15 % validation, 15 % test.

    The draw goes by a hash of each name, so an image more moves few of the others.

    Args:
        names: What is split, each once.
        split: train, validation or test.
        seed: Of the draw.
    """
    held_out = round(HELD_OUT_SHARE * len(names))
    validation_count = max(held_out, 1) if len(names) > 1 else 0
    test_end = validation_count + held_out
    ends = {
        "validation": (0, validation_count),
        "test": (validation_count, test_end),
        "train": (test_end, len(names)),
    }
    drawn = set(sorted(names, key=lambda name: _hash(f"{seed}:{name}"))[slice(*ends[split])])
    return [name for name in names if name in drawn]


def _hash(text):
    return hashlib.sha256(text.encode("utf-8", "surrogateescape")).digest()

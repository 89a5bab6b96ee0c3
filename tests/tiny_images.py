"""Small pictures that differ, and folders of them in every form that captions are kept in."""

import json

import numpy as np
from PIL import Image


def make_image(seed, size=(40, 40), mode="RGB"):
    """A smooth random picture, so that JPEG keeps it; `size` is (width, height)."""
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 256, (4, 4, 3), dtype=np.uint8))
    return coarse.resize(size, Image.Resampling.BICUBIC).convert(mode)


def make_folder(folder, count=4, *, size=(40, 40), first=0):
    """Images with captions in metadata.jsonl."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = []
    for index in range(first, first + count):
        make_image(index, size).save(folder / f"{index:03d}.png")
        lines.append({"file_name": f"{index:03d}.png", "text": f"shoe number {index}"})
    write_jsonl(folder, lines)
    return folder


def write_jsonl(folder, entries):
    text = "".join(json.dumps(entry) + "\n" for entry in entries)
    (folder / "metadata.jsonl").write_text(text)


def make_splits(folder, train=4, validation=2, *, size=(40, 40)):
    """Folders train and validation."""
    make_folder(folder / "train", train, size=size)
    make_folder(folder / "validation", validation, size=size, first=100)
    return folder

"""`sdkit check`: valid images from black, flat, damaged and unreadable ones."""

import json
import os
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from sdkit.commands.options import BAD, AsJson

IMAGE_ENDINGS = (".png", ".jpg", ".jpeg", ".webp", ".tif", ".tiff", ".gif", ".bmp", ".ppm")


def check(
    paths: Annotated[
        list[Path],
        typer.Argument(metavar="PATH", help="Image files, and folders to search for images."),
    ],
    as_json: AsJson = False,
):
    """Tell valid images from black, flat, damaged and unreadable ones.

    Files are judged whatever their name; in folders, and the folders in them, all files with the
    ending of an image. Exits with 1 if any is bad.
    """
    files = find_image_files(paths)
    from sdkit.verdict import judge_image_file

    verdicts = {file: judge_image_file(file) for file in files}
    bad_count = sum(not verdict.valid for verdict in verdicts.values())
    if as_json:
        images = [{"path": str(file), **asdict(v)} for file, v in verdicts.items()]
        typer.echo(
            json.dumps({"checked": len(files), "bad": bad_count, "images": images}, indent=2)
        )
    else:
        _print_verdicts(verdicts)
        typer.echo(f"{len(files)} checked, {bad_count} bad")
    raise typer.Exit(BAD if bad_count else 0)


def find_image_files(paths):
    """Returns the files to check, each once: those named, and the images in the folders named.

    Raises:
        ValidationError: There is nothing to check in a folder.
    """
    from sdkit.validation import ValidationError

    files = {}
    for path in paths:
        if path.is_dir():
            found = _search_folder(path)
            if not found:
                raise ValidationError(
                    f"{path}: no image in this folder. Expected {', '.join(IMAGE_ENDINGS)}."
                )
            files.update(dict.fromkeys(found))
        else:
            files[path] = None  # a missing one gets its verdict in its line, beside the others
    return list(files)


def _search_folder(folder):
    from sdkit.validation import ValidationError

    def refuse_folder(error):
        raise ValidationError(
            f"{error.filename}: cannot be searched ({error.strerror}). Check its permissions."
        )

    return sorted(
        Path(parent, name)
        for parent, _, names in os.walk(folder, onerror=refuse_folder)
        for name in names
        if name.lower().endswith(IMAGE_ENDINGS)
    )


def _print_verdicts(verdicts):
    words = {file: "ok" if v.valid else v.problem for file, v in verdicts.items()}
    word_width = max(map(len, words.values()))
    path_width = max(len(_printable(file)) for file in verdicts)
    for file, verdict in verdicts.items():
        typer.echo(
            f"{words[file]:{word_width}}  {_printable(file):{path_width}}  {verdict.message}"
        )


def _printable(path):
    """A path on one line, whatever characters are in its name."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in str(path))

"""The image files of a folder and their captions, in any of the forms that people keep them in.

`metadata.jsonl` or `metadata.csv` (Hugging Face's imagefolder), `captions.json` (a list of entries,
as the report's project wrote it, or a mapping), or a text file beside each image. A table speaks
for its folder and all below it, unless one further down does.
"""

import os
import unicodedata
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from PIL import Image

from sdkit.finetuning.caption_table import TABLES, clean_caption, read_table
from sdkit.finetuning.dataset_report import Finding
from sdkit.finetuning.splits import FOLDER_NAMES
from sdkit.validation import ValidationError

TEXT_ENDINGS = (".txt", ".caption", ".TXT", ".CAPTION")
IMAGES_FOLDER = "images"  # where the report's project kept them, beside captions.json
# What phones and browsers leave and Pillow may not read: told as unreadable, not passed over.
OTHER_IMAGE_ENDINGS = {".heic", ".heif", ".avif", ".jxl", ".svg", ".raw", ".dng", ".cr2", ".nef"}
ABOVE = ".."  # the folder above, where a table may stand for all splits
SPLIT_FOLDERS = {name for names in FOLDER_NAMES.values() for name in names}


@dataclass(frozen=True)
class CaptionedFile:
    """An image file and its caption, not looked at yet.

    Attributes:
        name: Its path within the folder, with forward slashes.
        path: Where it is.
        caption: Its caption, or None.
        findings: What is wrong with the caption.
    """

    name: str
    path: Path
    caption: str | None
    findings: tuple = ()


def find_captioned_files(folder, *, is_split=False) -> list:
    """Returns a CaptionedFile for each image in a folder, and for each that a table names.

    Args:
        folder: Searched with the folders in it; hidden files are passed over.
        is_split: Whether it is one of several, whose table may stand above it.

    Raises:
        ValidationError: The folder or a table of captions cannot be read.
    """
    folder = Path(folder)
    paths = list(_walk(folder))
    tables = _read_tables(folder, paths, is_split)
    named = {name for place, rows in tables.items() for name in rows
             if not _is_within(name) or _find_place(name, tables) == place}  # fmt: skip
    return [
        _find_caption(folder, name, tables) for name in sorted(_find_images(folder, paths) | named)
    ]


def _find_caption(folder, name, tables):
    """Returns the CaptionedFile of a name: from the nearest table, or from the text beside it."""
    place = _find_place(name, tables)
    if place is None:
        caption, findings = _read_text_beside(folder / name)
        where = f"no text file {PurePosixPath(name).stem}.txt beside it, or it is empty"
    else:
        known = tables[place].get(name)
        caption, findings = known or (None, [])
        where = f"{'not' if known is None else 'empty'} in {_find_table(_at(folder, place)).name}"
    if not caption and not any(finding.is_fatal for finding in findings):
        findings = [*findings, Finding("no-caption", where)]
    if not _is_within(name):
        findings = [*findings, Finding("outside", "outside the folder; put it in")]
    return CaptionedFile(name, folder / name, caption, tuple(findings))


def _read_tables(folder, paths, is_split):
    """Returns {folder of a table: {path within `folder`: (caption, findings)}}."""
    places = {path.parent.relative_to(folder).as_posix() for path in paths if path.name in TABLES}
    tables = {}
    if is_split and _find_table(folder.parent):
        places.add(ABOVE)
    for place in sorted(places):
        rows = read_table(_find_table(_at(folder, place)))
        tables[place] = {_place_row(folder, place, name): row for name, row in rows.items()}
        tables[place].pop(None, None)
    return tables


def _at(folder, place):
    return folder.parent if place == ABOVE else folder / place


def _find_table(folder):
    """Returns the path of a folder's table, even of a link that leads nowhere, or None."""
    paths = [folder / name for name in TABLES]
    return next((p for p in paths if os.path.lexists(p) and not p.is_dir()), None)


def _place_row(folder, place, name):
    """The path within `folder` that a table's file name means; None if it is another split's."""
    inside = f"{IMAGES_FOLDER}/{name}"
    beside = _at(folder, place)
    # os.path.exists takes any text; Path.exists raises where it is too long for a name.
    spellings = [
        unicodedata.normalize(form, text) for text in (name, inside) for form in ("NFC", "NFD")
    ]
    if not os.path.exists(beside / name):  # macOS takes names apart that are written together
        name = next((text for text in spellings if os.path.exists(beside / text)), name)
    if place == ABOVE:
        first, _, rest = name.partition("/")
        if first == folder.name and rest:
            return rest
        return None if first in SPLIT_FOLDERS else f"{ABOVE}/{name}"
    return name if place == "." or not _is_within(name) else f"{place}/{name}"


def _find_place(name, tables):
    """The folder of the table that speaks for a file, or None."""
    parents = [parent.as_posix() for parent in PurePosixPath(name).parents]
    return next((place for place in (*parents, ABOVE, ".") if place in tables), None)


def _find_images(folder, paths):
    endings = {*Image.registered_extensions(), *OTHER_IMAGE_ENDINGS} - {".pdf", ".mpg", ".mpeg"}
    return {path.relative_to(folder).as_posix() for path in paths if path.suffix.lower() in endings}


def _walk(folder):
    """Yields the files that are not hidden; links to folders are followed, but in no circle."""

    def refuse(error):
        raise ValidationError(
            f"{error.filename}: cannot be searched ({error.strerror}). Check its permissions."
        )

    seen = set()
    for parent, folders, files in os.walk(folder, onerror=refuse, followlinks=True):
        seen.add(os.path.realpath(parent))
        folders[:] = sorted(
            name
            for name in folders
            if not name.startswith(".") and os.path.realpath(Path(parent, name)) not in seen
        )
        yield from (Path(parent, name) for name in files if not name.startswith("."))


def _is_within(name):
    return not PurePosixPath(name).is_absolute() and ".." not in PurePosixPath(name).parts


def _read_text_beside(path):
    for ending in TEXT_ENDINGS:
        text_path = path.with_suffix(ending)
        if text_path.is_file():
            try:
                return clean_caption(text_path.read_text(encoding="utf-8-sig")), []
            except (OSError, UnicodeDecodeError) as error:
                message = f"{text_path.name} cannot be read ({error}); write it in UTF-8"
                return None, [Finding("unreadable-caption", message)]
    return None, []

"""A table of captions: metadata.jsonl, metadata.csv or captions.json, read entry by entry."""

import csv
import io
import json
import os
import posixpath
from pathlib import Path, PurePosixPath

from sdkit.finetuning.dataset_report import Finding
from sdkit.validation import ValidationError

TABLES = ("metadata.jsonl", "metadata.csv", "captions.json")  # the first of them that is there
FILE_COLUMNS = ("file_name", "image_file", "image", "file", "filename", "image_path")
CAPTION_COLUMNS = ("text", "caption", "prompt")


def read_table(path) -> dict:
    """Returns {file name: (caption or None, findings)}.

    Args:
        path: Of a file that bears one of the names in TABLES.

    Raises:
        ValidationError: It is not in its format; the message names the line.
    """
    if not path.is_file():  # a pipe would be waited for
        raise ValidationError(
            f"{path}: is no file that can be read, or a link that leads nowhere. Expected a table "
            "of captions; put it there, or remove this."
        )
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise ValidationError(
            f"{path}: cannot be read ({error}). Expected a table of captions in UTF-8; write it "
            "again, or check its permissions."
        ) from error
    entries = {
        "metadata.jsonl": _read_jsonl, "metadata.csv": _read_csv, "captions.json": _read_json
    }[path.name](text, path)  # fmt: skip
    rows = {}
    for where, entry in entries:
        given = [entry[c] for c in FILE_COLUMNS if isinstance(entry.get(c), str)]
        name = next(filter(None, given), None)
        if not name:
            raise ValidationError(
                f"{where}: names no file ({_shorten(entry)}). Expected one of "
                f"{', '.join(FILE_COLUMNS)}, and one of {', '.join(CAPTION_COLUMNS)}."
            )
        name = _place_within(path.parent, name.replace("\\", "/"))
        caption, findings = _read_caption(entry)
        if name not in rows:
            rows[name] = (caption, findings)
        elif caption != rows[name][0]:
            message = f"{where} gives another caption; the first is used"
            rows[name][1].append(Finding("two-captions", message, is_fatal=False))
    return rows


def _place_within(folder, name):
    """Returns the shortest path from a table's folder to a file, if it is within, else the name."""
    short = posixpath.normpath(name)
    for root in (os.path.abspath(folder), os.path.realpath(folder)):
        if Path(short).is_relative_to(root):
            short = os.path.relpath(short, root)
    is_outside = short.startswith(("/", "../"))
    return PurePosixPath(name).as_posix() if is_outside else short


def _read_caption(entry):
    """Returns the caption of an entry, or None, and what is wrong with it."""
    given = next((entry[c] for c in CAPTION_COLUMNS if entry.get(c) not in (None, "")), None)
    if given is None:
        return None, []
    if not isinstance(given, str):
        message = f"{_shorten(given)} is no text; write one caption as a text"
        return None, [Finding("no-caption", message)]
    if any("\ud800" <= letter <= "\udfff" for letter in given):
        message = f"{_shorten(given)} is half of a character; write it in UTF-8"
        return None, [Finding("unreadable-caption", message)]
    return clean_caption(given), []


def _read_jsonl(text, path):
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            where = f"{path}, line {number}"
            yield where, _check_entry(_parse(line, where), where)


def _read_csv(text, path):
    reader = csv.DictReader(io.StringIO(text))
    try:
        for number, row in enumerate(reader, 2):
            yield f"{path}, row {number}", row
    except csv.Error as error:
        raise ValidationError(
            f"{path}, line {reader.line_num}: not CSV ({error}). Mend it, or write the file again."
        ) from error


def _read_json(text, path):
    content = _parse(text, path)
    if isinstance(content, dict):
        for name, value in content.items():
            entry = value if isinstance(value, dict) else {"caption": value}
            yield f"{path}, {name}", {**entry, "file_name": name}
    elif isinstance(content, list):
        for number, entry in enumerate(content):
            where = f"{path}, entry {number}"
            yield where, _check_entry(entry, where)
    else:
        raise ValidationError(
            f"{path}: holds {_shorten(content)}. Expected a list of entries with image_file and "
            "caption, or a mapping of file names to captions."
        )


def _parse(text, where):
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValidationError(
            f"{where}: not JSON ({error}). Mend it, or write the file again."
        ) from error


def _check_entry(entry, where):
    if not isinstance(entry, dict):
        raise ValidationError(
            f"{where}: {_shorten(entry)}. Expected names with values, such as "
            '{"file_name": "shoe.jpg", "text": "a shoe"}.'
        )
    return entry


def clean_caption(text):
    """Returns a caption on one line, or None if nothing is left."""
    return " ".join(text.split()) or None


def _shorten(value):
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:60]}..."

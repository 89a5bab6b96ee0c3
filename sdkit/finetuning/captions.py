"""The image files of a folder and their captions, in any of the forms that people keep them in.

`metadata.jsonl` or `metadata.csv` (Hugging Face's imagefolder), `captions.json` (a list of entries,
as the report's project wrote it, or a mapping), or a text file beside each image.
"""

import csv
import io
import json
import os
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from PIL import Image

from sdkit.finetuning.dataset_report import Finding
from sdkit.validation import ValidationError

TABLES = ("metadata.jsonl", "metadata.csv", "captions.json")
TEXT_ENDINGS = (".txt", ".caption")
FILE_COLUMNS = ("file_name", "image_file", "image", "file", "filename", "image_path")
CAPTION_COLUMNS = ("text", "caption", "prompt")
IMAGES_FOLDER = "images"  # where the report's project kept them, beside captions.json
# What phones and browsers leave and Pillow may not read: told as unreadable, not passed over.
OTHER_IMAGE_ENDINGS = {".heic", ".heif", ".avif", ".jxl", ".svg", ".raw", ".dng", ".cr2", ".nef"}


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


def find_captioned_files(folder) -> list:
    """Returns a CaptionedFile for each image in a folder, and for each that a table names.

    Args:
        folder: Searched with the folders in it; hidden files are passed over.

    Raises:
        ValidationError: The folder or its table of captions cannot be read.
    """
    folder = Path(folder)
    images = _find_images(folder)
    table = next((folder / name for name in TABLES if (folder / name).is_file()), None)
    rows = _read_table(table) if table else {}
    found = []
    for name in sorted({*images, *(_resolve(row, folder) for row in rows)}):
        findings, caption = [], None
        if table:
            row = next((rows[r] for r in (name, _without_images(name)) if r in rows), None)
            caption, findings = row if row else (None, [])
            where = f"not in {table.name}" if row is None else f"empty in {table.name}"
        else:
            caption, findings = _read_text_beside(folder / name)
            where = f"no text file {PurePosixPath(name).stem}.txt beside it, or it is empty"
        if not caption and not any(finding.is_fatal for finding in findings):
            findings = [*findings, Finding("no-caption", where)]
        if not _is_within(name):
            findings = [*findings, Finding("outside", "outside the folder; put it in")]
        found.append(CaptionedFile(name, folder / name, caption, tuple(findings)))
    return found


def _find_images(folder):
    endings = {*Image.registered_extensions(), *OTHER_IMAGE_ENDINGS} - {".pdf", ".mpg", ".mpeg"}
    return {
        path.relative_to(folder).as_posix()
        for path in _walk(folder)
        if path.suffix.lower() in endings
    }


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


def _without_images(name):
    return name.removeprefix(f"{IMAGES_FOLDER}/")


def _resolve(row, folder):
    """The path within the folder that a table's file name means."""
    inside = f"{IMAGES_FOLDER}/{row}"
    return inside if not (folder / row).exists() and (folder / inside).exists() else row


def _is_within(name):
    return not PurePosixPath(name).is_absolute() and ".." not in PurePosixPath(name).parts


def _read_text_beside(path):
    for ending in TEXT_ENDINGS:
        text_path = path.with_suffix(ending)
        if text_path.is_file():
            try:
                return _clean(text_path.read_text(encoding="utf-8-sig")), []
            except (OSError, UnicodeDecodeError) as error:
                message = f"{text_path.name} cannot be read ({error}); write it in UTF-8"
                return None, [Finding("unreadable-caption", message)]
    return None, []


def _read_table(path):
    """Returns {file name: (caption or None, findings)}.

    Raises:
        ValidationError: It is not in its format; the message names the line.
    """
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
        name = next((entry[c] for c in FILE_COLUMNS if isinstance(entry.get(c), str)), None)
        if not name:
            raise ValidationError(
                f"{where}: names no file ({_shorten(entry)}). Expected one of "
                f"{', '.join(FILE_COLUMNS)}, and one of {', '.join(CAPTION_COLUMNS)}."
            )
        name = PurePosixPath(name.replace("\\", "/")).as_posix()
        given = next((entry[c] for c in CAPTION_COLUMNS if c in entry), None)
        caption = _clean(given) if isinstance(given, str) else None
        if name not in rows:
            rows[name] = (caption, [])
        elif caption != rows[name][0]:
            message = f"{where} gives another caption; the first is used"
            rows[name][1].append(Finding("two-captions", message, is_fatal=False))
    return rows


def _read_jsonl(text, path):
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            where = f"{path}, line {number}"
            yield where, _check_entry(_parse(line, where), where)


def _read_csv(text, path):
    for number, row in enumerate(csv.DictReader(io.StringIO(text)), 2):
        yield f"{path}, row {number}", row


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
    except ValueError as error:
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


def _clean(text):
    return " ".join(text.split()) or None


def _shorten(value):
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:60]}..."

"""Turns the public "Fashion Product Images" download into a folder to train on."""

import codecs
import json
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from PIL import Image, ImageOps
from tqdm.auto import tqdm

from sdkit.finetuning.picture import convert_to_rgb
from sdkit.finetuning.splits import SPLITS, draw_split
from sdkit.mini.catalogue import REPORT_STUDIO
from sdkit.run_folder import begin_run, finish_run
from sdkit.validation import ValidationError, check_is_writable
from sdkit.verdict import FILE_FORMATS, strict_pillow

COLUMNS = (
    "id", "gender", "masterCategory", "subCategory", "articleType", "baseColour", "season", "year",
    "usage", "productDisplayName",
)  # fmt: skip
# The download holds a second copy of itself in this folder; it is read only where it is the first.
SECOND_COPY = "myntradataset"
KINDS = ("articleType", "subCategory", "masterCategory")  # the first that is known
UNKNOWN = ("", "NA")  # both are written where nothing is known; "NA" is no missing number here
GENDERS = ("men", "women", "boys", "girls", "unisex", "kids")
BRAND_WORDS = 3  # a name without a gender in it tells no brand


@dataclass(frozen=True)
class PreparedProducts:
    """What was made of the download.

    Attributes:
        folder: With folders of the splits, each with its `metadata.jsonl`.
        counts: {split: images}.
        skipped: {product id, or line of the table: why it was left out}.
    """

    folder: Path
    counts: dict[str, int]
    skipped: dict[str, str]

    def to_json(self) -> str:
        """All of it as JSON."""
        return json.dumps(asdict(self), indent=2, default=str)

    def __str__(self):
        """The counts, and a line for each product left out."""
        counts = ", ".join(f"{count} {split}" for split, count in self.counts.items())
        lines = [f"  skipped {name}: {reason}" for name, reason in self.skipped.items()]
        return "\n".join([f"{self.folder}: {counts}, {len(self.skipped)} skipped", *lines])


def prepare_fashion_products(
    source,
    output_folder,
    *,
    article_types: Sequence[str] = ("Casual Shoes",),
    size_pixels: int = 512,
    limit: int | None = None,
    seed: int = 42,
    progress: bool = True,
) -> PreparedProducts:
    """Writes captioned square pictures of the products, split 70, 15 and 15 % by a seed.

    The rights to the photographs are doubtful: what this writes is for your own use.

    Args:
        source: The unpacked download, with `styles.csv` and `images`.
        output_folder: Is made; nothing may be there yet.
        article_types: Which products, one name or several; empty takes all.
        size_pixels: Larger pictures are reduced to this side; smaller ones are not enlarged.
        limit: At most so many products, the first of the table.
        seed: Of the split.
        progress: Show a bar.

    Returns:
        PreparedProducts.

    Raises:
        ValidationError: There is no such download, nothing in it is usable, or there is something
            at `output_folder` already.
    """
    output_folder = _check_request(Path(output_folder), size_pixels, limit)
    root = _find_root(Path(source))
    rows, skipped = _choose_products(root / "styles.csv", article_types)
    check_is_writable(output_folder.parent)
    partial = begin_run(output_folder)
    try:
        bar = tqdm(rows, "prepare products", disable=not progress, delay=2)
        written, left_out = _write_pictures(root, bar, partial, size_pixels, limit)
        skipped |= left_out
        _check_is_enough(root, written, skipped)
        counts = {split: _write_split(partial, written, split, seed) for split in SPLITS}
        return PreparedProducts(finish_run(partial), counts, skipped)
    except OSError as error:
        raise ValidationError(
            f"{error.filename or partial}: cannot be written ({error.strerror or error}). Expected "
            "room and permission to write; the same call begins again."
        ) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)  # thousands of pictures, if it failed


def _choose_products(path, article_types):
    """Returns (rows of the table that are of these types, why others were left out)."""
    rows, skipped = read_styles(path)
    article_types = [article_types] if isinstance(article_types, str) else list(article_types or ())
    wanted = {name.casefold() for name in article_types}
    rows = [row for row in rows if not wanted or row["articleType"].casefold() in wanted]
    if not rows:
        raise ValidationError(
            f"{path}: no product is of {', '.join(article_types) or 'any kind'}. Expected values "
            "of its column articleType, such as Casual Shoes."
        )
    return rows, skipped


def _write_pictures(root, rows, folder, size_pixels, limit):
    """Writes a picture each, `limit` at most; returns ({id: row}, {id: why it has none})."""
    written, left_out = {}, {}
    for row in rows:
        if len(written) == limit:
            break
        reason = _write_square(root / "images", row["id"], folder, size_pixels)
        if reason:
            left_out[row["id"]] = reason
        else:
            written[row["id"]] = row
    return written, left_out


def _check_is_enough(root, written, skipped):
    if len(written) < 2:
        listed = "".join(f"\n  {name}: {why}" for name, why in list(skipped.items())[:20])
        raise ValidationError(
            f"{root}: {len(written)} products can be used. Expected at least 2.{listed}"
        )


def _check_request(output_folder, size_pixels, limit) -> Path:
    if output_folder.exists() and (output_folder.is_file() or any(output_folder.iterdir())):
        raise ValidationError(
            f"{output_folder}: there is something already. Expected a new folder; remove this one, "
            "or name another."
        )
    if not isinstance(size_pixels, int) or size_pixels < 8:
        raise ValidationError(
            f"size_pixels: got {size_pixels!r}. Expected a whole number, at least 8."
        )
    if limit is not None and (not isinstance(limit, int) or limit < 2):
        raise ValidationError(
            f"limit: got {limit!r}. Expected a whole number, at least 2: one has to be held out."
        )
    return output_folder


def read_styles(path) -> tuple[list[dict], dict]:
    """Reads `styles.csv`, whose last column holds commas that no quote guards.

    Args:
        path: The table.

    Returns:
        ([{column: text}], {line: why it was left out}).

    Raises:
        ValidationError: It is no such table.
    """
    header, *lines = Path(path).read_bytes().removeprefix(codecs.BOM_UTF8).split(b"\n")
    shown = header.decode("utf-8", "backslashreplace").strip()
    columns = [name.strip().strip('"') for name in shown.split(",")]
    missing = [name for name in COLUMNS if name not in columns]
    if missing or columns[-1] != COLUMNS[-1]:
        lacks = f", so {', '.join(missing)} is not there" if len(missing) < len(COLUMNS) else ""
        raise ValidationError(
            f"{path}: begins with {shown or 'nothing'!r}{lacks}. Expected {','.join(COLUMNS)}."
        )
    rows, skipped = {}, {}
    for number, line in enumerate(lines, 2):
        text = line.decode("utf-8", "backslashreplace")
        values = [value.strip().strip('"').strip() for value in text.split(",", len(columns) - 1)]
        row = dict(zip(columns, values, strict=False))
        if not text.strip():
            continue
        if len(values) < len(columns) or not (row["id"].isascii() and row["id"].isdecimal()):
            skipped[f"line {number}"] = f"not a product: {text[:60]!r}"
        elif row["id"] in rows:
            skipped[f"line {number}"] = f"product {row['id']} stands there twice"
        elif not _is_utf8(line):
            skipped[f"line {number}"] = f"not in UTF-8: {text[:60]!r}"
        else:
            rows[row["id"]] = {name: row[name] for name in COLUMNS}
    return list(rows.values()), skipped


def make_caption(row: dict) -> str:
    """The caption of a product: colour, kind, gender, brand, season; what is unknown is left out.

    Args:
        row: Of `read_styles`.
    """
    known = {name: "" if value in UNKNOWN else value for name, value in row.items()}
    kind = next((known[name] for name in KINDS if known[name]), "product")
    words = ["A professional product photo of", known["baseColour"].lower(), kind.lower()]
    if known["gender"]:
        words.append(f"for {known['gender'].lower()}")
    if brand := find_brand(known["productDisplayName"]):
        words.append(f"by {brand}")
    parts = [" ".join(word for word in words if word)]
    if known["season"]:
        parts.append(f"{known['season'].lower()} season")
    return ", ".join([*parts, REPORT_STUDIO])


def find_brand(display_name: str) -> str | None:
    """The words before the gender, as in "Puma Men Black Shoes"; None if they tell no brand."""
    words = display_name.split()
    for place, word in enumerate(words):
        if word.lower().removesuffix("'s") in GENDERS:
            brand = " ".join(words[:place]).strip(",")
            return brand if 0 < place <= BRAND_WORDS else None
    return None


def _find_root(source) -> Path:
    for root in (source, source / SECOND_COPY):
        if (root / "styles.csv").is_file() and (root / "images").is_dir():
            return root
    raise ValidationError(
        f"{source}: holds no styles.csv with a folder images beside it. Expected the unpacked "
        '"Fashion Product Images" download.'
    )


def _write_square(images, product_id, folder, size_pixels) -> str | None:
    """Writes one picture, padded with white; returns why not, if it cannot be read."""
    path = images / f"{product_id}.jpg"
    if not path.is_file():
        return "no image"
    try:
        with strict_pillow(), Image.open(path, formats=FILE_FORMATS) as opened:
            image, _ = convert_to_rgb(ImageOps.exif_transpose(opened))  # white where transparent
    except Exception as error:  # a file of any origin: its decoder may fail in any way
        return f"image cannot be read: {error}"
    side = max(image.size)
    square = Image.new("RGB", (side, side), "white")
    square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
    if side > size_pixels:
        square = square.resize((size_pixels, size_pixels), Image.Resampling.LANCZOS)
    path = folder / f"{product_id}.png"  # without loss: JPEG would stain the white
    try:
        square.save(path)
    except OSError as error:  # Pillow's does not say of which file
        raise OSError(error.errno, error.strerror or str(error), str(path)) from error
    return None


def _is_utf8(line) -> bool:
    try:
        line.decode("utf-8")
    except UnicodeDecodeError:
        return False
    return True


def _write_split(folder, rows, split, seed) -> int:
    names = draw_split(list(rows), split, seed=seed)
    if not names:
        return 0
    (folder / split).mkdir()
    lines = []
    for name in names:
        (folder / f"{name}.png").rename(folder / split / f"{name}.png")
        about = {column: None if rows[name][column] in UNKNOWN else rows[name][column]
                 for column in COLUMNS[1:]}  # fmt: skip
        entry = {"file_name": f"{name}.png", "text": make_caption(rows[name]), **about}
        lines.append(json.dumps(entry, ensure_ascii=False) + "\n")
    (folder / split / "metadata.jsonl").write_text("".join(lines), "utf-8")
    return len(names)

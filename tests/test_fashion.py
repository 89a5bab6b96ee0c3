"""The download's real quirks, planted one by one."""

import json
import resource

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from sdkit.cli import app
from sdkit.finetuning.fashion import COLUMNS, find_brand, prepare_fashion_products, read_styles
from sdkit.validation import ValidationError

ROW = "{id},Men,Footwear,Shoes,Casual Shoes,{colour},Summer,2011,{usage},{name}"


def make_download(folder, count=20, extra=()):
    (folder / "images").mkdir(parents=True)
    lines = [",".join(COLUMNS)]
    for i in range(count):
        name = "Puma Men Black, White Shoes"
        lines.append(ROW.format(id=1000 + i, colour="Black", usage="NA", name=name))
        Image.new("RGB", (30, 40), (i, 0, 0)).save(folder / "images" / f"{1000 + i}.jpg")
    (folder / "styles.csv").write_text("\n".join([*lines, *extra]) + "\n")
    return folder


def read_metadata(folder):
    return [
        json.loads(line)
        for split in ("train", "validation", "test")
        for line in (folder / split / "metadata.jsonl").read_text().splitlines()
    ]


def test_commas_and_na_and_the_caption(tmp_path):
    source = make_download(tmp_path / "source")
    prepared = prepare_fashion_products(source, tmp_path / "out", progress=False)
    assert prepared.counts == {"train": 14, "validation": 3, "test": 3}
    assert not prepared.skipped
    entries = read_metadata(tmp_path / "out")
    assert len({entry["file_name"] for entry in entries}) == 20
    for entry in entries:
        assert entry["productDisplayName"] == "Puma Men Black, White Shoes"
        assert entry["usage"] is None
        assert entry["text"] == (
            "A professional product photo of black casual shoes for men by Puma, summer season, "
            "centered on a pure white studio background"
        )


def test_pictures_are_square_with_white_beside(tmp_path):
    prepare_fashion_products(make_download(tmp_path / "source"), tmp_path / "out", progress=False)
    pixels = np.asarray(Image.open(next((tmp_path / "out" / "train").glob("*.png"))))
    assert pixels.shape == (40, 40, 3)
    assert (pixels[:, :5] == 255).all() and (pixels[:, -5:] == 255).all()
    assert (pixels[:, 5:35] < 60).all()


def test_a_transparent_picture_gets_the_white_that_its_caption_tells_of(tmp_path):
    source = make_download(tmp_path / "source")
    image = Image.new("RGBA", (40, 40), (0, 0, 0, 0))
    image.paste((200, 0, 0, 255), (10, 10, 30, 30))
    image.save(source / "images" / "1005.jpg", format="PNG")  # as some of them are
    prepare_fashion_products(source, tmp_path / "out", progress=False)
    (path,) = (tmp_path / "out").rglob("1005.png")
    with Image.open(path) as written:
        assert written.getpixel((0, 0)) == (255, 255, 255)
        assert written.getpixel((20, 20)) == (200, 0, 0)


def test_a_full_disk(tmp_path):
    source = make_download(tmp_path / "source")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (80, limits[1]))
        with pytest.raises(ValidationError, match=r"1000\.png: cannot be written \(File too large"):
            prepare_fashion_products(source, tmp_path / "out", progress=False)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert not (tmp_path / "out").exists()
    prepare_fashion_products(source, tmp_path / "out", progress=False)


def test_what_cannot_be_used_is_named(tmp_path):
    extra = [
        ROW.format(id=7, colour="Red", usage="Casual", name="no image"),
        ROW.format(id=8, colour="Red", usage="Casual", name="cut image"),
        ROW.format(id=1000, colour="Red", usage="Casual", name="twice"),
        "9,Men,too short",
    ]
    source = make_download(tmp_path / "source", extra=extra)
    whole = (source / "images" / "1000.jpg").read_bytes()
    (source / "images" / "8.jpg").write_bytes(whole[: len(whole) - 60])
    prepared = prepare_fashion_products(source, tmp_path / "out", progress=False)
    assert prepared.skipped.keys() == {"7", "8", "line 24", "line 25"}
    assert prepared.skipped["7"] == "no image"
    assert "truncated" in prepared.skipped["8"].lower()
    assert "twice" in prepared.skipped["line 24"]
    assert sum(prepared.counts.values()) == 20


def test_second_copy_is_read_once_and_found_alone(tmp_path):
    source = make_download(tmp_path / "source")
    make_download(source / "myntradataset", count=25)
    prepared = prepare_fashion_products(source, tmp_path / "out", progress=False)
    assert sum(prepared.counts.values()) == 20
    (source / "styles.csv").unlink()
    prepared = prepare_fashion_products(source, tmp_path / "second", progress=False)
    assert sum(prepared.counts.values()) == 25


def test_split_goes_by_the_seed(tmp_path):
    source = make_download(tmp_path / "source")
    names = []
    for place, seed in enumerate((42, 42, 43)):
        prepare_fashion_products(source, tmp_path / f"{place}", seed=seed, progress=False)
        names.append(sorted(p.name for p in (tmp_path / f"{place}" / "test").glob("*.png")))
    assert names[0] == names[1] != names[2]


def test_refusals(tmp_path):
    source = make_download(tmp_path / "source")
    with pytest.raises(ValidationError, match="no styles.csv"):
        prepare_fashion_products(tmp_path, tmp_path / "out")
    with pytest.raises(ValidationError, match="no product is of Hats"):
        prepare_fashion_products(source, tmp_path / "out", article_types=["Hats"])
    with pytest.raises(ValidationError, match="something already"):
        prepare_fashion_products(source, source)
    with pytest.raises(ValidationError, match="at least 2"):
        prepare_fashion_products(source, tmp_path / "out", limit=1)
    (source / "styles.csv").write_text("a,b\n")
    with pytest.raises(ValidationError, match="begins with 'a,b'"):
        read_styles(source / "styles.csv")
    assert not (tmp_path / "out").exists()
    assert len(list((source / "images").iterdir())) == 20


def test_brand_is_what_stands_before_the_gender():
    assert find_brand("Red Tape Men's Shoes") == "Red Tape"
    assert find_brand("Men Shoes") is None
    assert find_brand("Puma, Men Shoes") == "Puma"
    assert find_brand("A shoe") is None


def test_command(tmp_path):
    source = make_download(tmp_path / "source")
    result = CliRunner().invoke(
        app, ["prepare", str(source), str(tmp_path / "out"), "--limit", "10", "--json"]
    )
    assert result.exit_code == 0, result.output
    assert sum(json.loads(result.stdout)["counts"].values()) == 10
    result = CliRunner().invoke(app, ["prepare", str(tmp_path), str(tmp_path / "other")])
    assert result.exit_code == 2
    assert "no styles.csv" in result.output


def change_table(source, change):
    path = source / "styles.csv"
    path.write_bytes(change(path.read_bytes()))


def test_a_table_that_other_programs_wrote(tmp_path):
    """A mark at its front, Windows' line ends, quoted names, another order, one column more."""
    source = make_download(tmp_path / "source")
    expected, _ = read_styles(source / "styles.csv")
    lines = [line.split(",", 9) for line in (source / "styles.csv").read_text().splitlines()]
    other = [[f'"{v}"' for v in ("x", *line[1:9], line[0], line[9])] for line in lines]
    text = "\r\n".join(",".join(line) for line in other)
    (source / "styles.csv").write_bytes(b"\xef\xbb\xbf" + text.encode())
    assert read_styles(source / "styles.csv") == (expected, {})


def test_one_line_that_cannot_be_read_costs_one_product(tmp_path):
    source = make_download(tmp_path / "source")
    latin = "Pumá".encode("latin-1")
    change_table(source, lambda table: table.replace(b"Puma", latin, 1))
    odd = "Puma\u2028\x0b\x85 Men".encode()  # what splitlines would split at
    change_table(source, lambda table: table.replace(b"Puma Men", odd, 1))
    rows, skipped = read_styles(source / "styles.csv")
    assert len(rows) == 19 and skipped.keys() == {"line 2"}
    assert skipped["line 2"].startswith("not in UTF-8: '1000,Men")


def test_a_column_that_is_missing_is_named(tmp_path):
    source = make_download(tmp_path / "source")
    change_table(source, lambda table: table.replace(b"season,", b"", 1))
    with pytest.raises(ValidationError, match="so season is not there"):
        prepare_fashion_products(source, tmp_path / "out", progress=False)


def test_one_kind_may_be_a_text_and_an_unknown_one_is_named_by_its_category(tmp_path):
    source = make_download(tmp_path / "source")
    options = {"article_types": "casual shoes", "progress": False}
    prepare_fashion_products(source, tmp_path / "out", **options)
    change_table(source, lambda table: table.replace(b",Shoes,Casual Shoes", b",NA,NA"))
    prepare_fashion_products(source, tmp_path / "all", article_types=(), progress=False)
    assert read_metadata(tmp_path / "all")[0]["text"].startswith(
        "A professional product photo of black footwear for men by Puma"
    )


def test_pictures_that_no_decoder_takes_are_named(tmp_path):
    """Among them a PostScript program, which Pillow would hand to another one."""
    source = make_download(tmp_path / "source")
    header = b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR\0\0\0(\0\0\0(\x08\x02\0\0\0\x03\x9c/:"
    for name, content in (("1003", header), ("1004", b""), ("1005", b"<html>")):
        (source / "images" / f"{name}.jpg").write_bytes(content)
    Image.new("RGB", (30, 30)).save(source / "images" / "1006.jpg", format="EPS")
    prepared = prepare_fashion_products(source, tmp_path / "out", progress=False)
    assert prepared.skipped.keys() == {"1003", "1004", "1005", "1006"}


def test_a_failure_leaves_nothing(tmp_path):
    source = make_download(tmp_path / "source")
    for path in (source / "images").iterdir():
        path.write_bytes(b"")
    with pytest.raises(ValidationError, match="0 products can be used"):
        prepare_fashion_products(source, tmp_path / "out", progress=False)
    with pytest.raises(ValidationError, match=r"styles\.csv: cannot be written to"):
        prepare_fashion_products(source, source / "styles.csv" / "out", progress=False)
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


@pytest.mark.parametrize("options", [{"size_pixels": "64"}, {"limit": 2.5}, {"limit": "3"}])
def test_numbers_that_are_none(tmp_path, options):
    with pytest.raises(ValidationError, match=f"{next(iter(options))}: got"):
        prepare_fashion_products(make_download(tmp_path / "source"), tmp_path / "out", **options)

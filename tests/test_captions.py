import json
import os
import sys
import unicodedata

import pytest
from tiny_images import make_image, write_jsonl

from sdkit.finetuning.captions import find_captioned_files
from sdkit.validation import ValidationError


def make_images(folder, *names):
    for seed, name in enumerate(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        make_image(seed).save(folder / name)
    return folder


def read_captions(folder):
    return {file.name: file.caption for file in find_captioned_files(folder)}


def find_kinds(folder):
    found = find_captioned_files(folder)
    return {file.name: [finding.kind for finding in file.findings] for file in found}


@pytest.mark.parametrize("column", ["text", "caption", "prompt"])
def test_metadata_jsonl(tmp_path, column):
    make_images(tmp_path, "b.png", "a.jpg")
    entries = [{"file_name": "b.png", column: "a boot"}, {"file_name": "a.jpg", column: "a shoe"}]
    write_jsonl(tmp_path, entries)
    assert read_captions(tmp_path) == {"a.jpg": "a shoe", "b.png": "a boot"}


def test_metadata_csv_with_commas_in_quotes(tmp_path):
    make_images(tmp_path, "a.png")
    (tmp_path / "metadata.csv").write_text('file_name,text\na.png,"a shoe, red"\n')
    assert read_captions(tmp_path) == {"a.png": "a shoe, red"}


def test_captions_json_as_the_reports_project_wrote_it(tmp_path):
    make_images(tmp_path, "images/11.png", "images/12.png")
    entries = [
        {"image_id": str(i), "image_file": f"{i}.png", "caption": f"shoe {i}",
         "metadata": {"color": "Black", "year": None}}
        for i in (11, 12)
    ]  # fmt: skip
    (tmp_path / "captions.json").write_text(json.dumps(entries))
    assert read_captions(tmp_path) == {"images/11.png": "shoe 11", "images/12.png": "shoe 12"}
    assert find_kinds(tmp_path) == {"images/11.png": [], "images/12.png": []}


@pytest.mark.parametrize("value", ["a shoe", {"caption": "a shoe"}, {"text": "a shoe"}])
def test_captions_json_as_a_mapping(tmp_path, value):
    make_images(tmp_path, "a.png")
    (tmp_path / "captions.json").write_text(json.dumps({"a.png": value}))
    assert read_captions(tmp_path) == {"a.png": "a shoe"}


def test_text_files_beside_the_images(tmp_path):
    make_images(tmp_path, "a.png", "deep/er/b.jpeg", "c.webp", "d.png")
    (tmp_path / "a.txt").write_text("\ufeff a shoe \nfrom  the left\n", encoding="utf-8")
    (tmp_path / "deep/er/b.txt").write_text("ein Schuh, größer")
    (tmp_path / "c.caption").write_text("a boot")
    (tmp_path / "d.txt").write_text(" \n")
    expected = {
        "a.png": "a shoe from the left",
        "c.webp": "a boot",
        "d.png": None,
        "deep/er/b.jpeg": "ein Schuh, größer",
    }
    assert read_captions(tmp_path) == expected
    assert find_kinds(tmp_path)["d.png"] == ["no-caption"]


def test_missing_and_empty_captions_are_told_apart_by_their_message(tmp_path):
    make_images(tmp_path, "a.png", "b.png", "c.png", "d.png")
    entries = [
        {"file_name": "a.png", "text": "a shoe"}, {"file_name": "b.png", "text": "  "},
        {"file_name": "c.png", "text": None},
    ]  # fmt: skip
    write_jsonl(tmp_path, entries)
    found = {file.name: file for file in find_captioned_files(tmp_path)}
    assert [f.findings for f in (found["a.png"],)] == [()]
    for name, message in (("b", "empty in"), ("c", "empty in"), ("d", "not in metadata.jsonl")):
        (finding,) = found[f"{name}.png"].findings
        assert finding.kind == "no-caption" and message in finding.message


def test_an_image_that_is_named_but_not_there_is_listed(tmp_path):
    make_images(tmp_path, "a.png")
    write_jsonl(tmp_path, [{"file_name": n, "text": "a shoe"} for n in ("a.png", "gone.png")])
    assert read_captions(tmp_path) == {"a.png": "a shoe", "gone.png": "a shoe"}


def test_no_table_leads_out_of_the_folder(tmp_path):
    make_images(tmp_path, "in/a.png", "secret.png")
    outside = ["../secret.png", str(tmp_path / "secret.png"), "x/../../secret.png"]
    write_jsonl(tmp_path / "in", [{"file_name": n, "text": "a"} for n in ("a.png", *outside)])
    kinds = find_kinds(tmp_path / "in")
    assert kinds.pop("a.png") == []
    assert len(kinds) == 3 and all(found == ["outside"] for found in kinds.values())


def test_two_captions_for_one_image(tmp_path):
    make_images(tmp_path, "a.png", "b.png")
    entries = [
        {"file_name": name, "text": text}
        for name, text in (("a.png", "one"), ("b.png", "same"), ("a.png", "two"), ("b.png", "same"))
    ]
    write_jsonl(tmp_path, entries)
    assert read_captions(tmp_path) == {"a.png": "one", "b.png": "same"}
    assert find_kinds(tmp_path) == {"a.png": ["two-captions"], "b.png": []}
    (finding,) = find_captioned_files(tmp_path)[0].findings
    assert "line 3" in finding.message and not finding.is_fatal


def test_hidden_files_and_other_files_are_passed_over(tmp_path):
    make_images(tmp_path, "a.png", ".hidden.png", ".git/b.png", "._a.png")
    for name in ("README.md", "ids.txt", "Thumbs.db", ".DS_Store"):
        (tmp_path / name).write_text("no image")
    (tmp_path / "a.txt").write_text("a shoe")
    assert read_captions(tmp_path) == {"a.png": "a shoe"}


def test_pictures_that_pillow_cannot_read_are_listed(tmp_path):
    (tmp_path / "a.HEIC").write_bytes(b"x")
    (tmp_path / "b.PNG").write_bytes(b"x")
    assert sorted(read_captions(tmp_path)) == ["a.HEIC", "b.PNG"]


@pytest.mark.parametrize(
    "name", ["a b.png", "-rf.png", "größe.png", "靴.png", "a'\"b.png", "a\nb.png", "a.b.c.png"]
)
def test_odd_names(tmp_path, name):
    make_images(tmp_path, name)
    (tmp_path / name).with_suffix(".txt").write_text("a shoe")
    assert read_captions(tmp_path) == {name: "a shoe"}
    write_jsonl(tmp_path, [{"file_name": name, "text": "a boot"}])
    assert read_captions(tmp_path) == {name: "a boot"}


@pytest.mark.skipif(sys.platform == "darwin", reason="macOS takes no such name")
def test_a_name_in_no_encoding(tmp_path):
    make_image(0).save(tmp_path / "a.png")
    os.rename(tmp_path / "a.png", os.fsencode(tmp_path) + b"/\xff\xfe.png")
    (file,) = find_captioned_files(tmp_path)
    assert file.path.exists() and os.fsencode(file.name) == b"\xff\xfe.png"


def test_backslashes_of_windows(tmp_path):
    make_images(tmp_path, "images/a.png")
    write_jsonl(tmp_path, [{"file_name": "images\\a.png", "text": "a shoe"}])
    assert read_captions(tmp_path) == {"images/a.png": "a shoe"}


def test_links_are_followed_but_in_no_circle(tmp_path):
    make_images(tmp_path, "real/a.png")
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "linked").symlink_to(tmp_path / "real")
    (tmp_path / "set" / "round").symlink_to(tmp_path / "set")
    (tmp_path / "set" / "b.png").symlink_to(tmp_path / "real" / "a.png")
    assert sorted(read_captions(tmp_path / "set")) == ["b.png", "linked/a.png"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("metadata.jsonl", '{"file_name": "a.png"}\n{"file_name": ', "metadata.jsonl, line 2"),
        ("metadata.jsonl", '["a.png", "shoe"]\n', "line 1.*Expected names with values"),
        ("metadata.jsonl", '{"text": "shoe"}\n', "names no file"),
        ("captions.json", "{", "not JSON"),
        ("captions.json", '"shoe"', "Expected a list of entries"),
        ("captions.json", '["a.png"]', "entry 0"),
        ("metadata.csv", "name,text\na.png,shoe\n", "row 2: names no file"),
        ("metadata.jsonl", b"\xff\xfe\x00", "UTF-8"),
        ("metadata.jsonl", "[" * 100_000, "line 1: not JSON"),
        (
            "metadata.csv",
            "file_name,text\na.png," + "a" * 200_000,
            "metadata.csv, line .*: not CSV",
        ),
    ],
)
def test_a_damaged_table_is_an_error_that_names_the_line(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValidationError, match=message):
        find_captioned_files(tmp_path)


def test_a_caption_that_is_not_utf8(tmp_path):
    make_images(tmp_path, "a.png")
    (tmp_path / "a.txt").write_bytes("größe".encode("latin-1"))
    assert find_kinds(tmp_path) == {"a.png": ["unreadable-caption"]}


def write_lines(path, rows):
    path.write_text("".join(json.dumps({"file_name": n, "text": t}) + "\n" for n, t in rows))


def test_a_table_speaks_for_its_folder_unless_one_further_down_does(tmp_path):
    make_images(tmp_path, "a.png", "deep/b.png", "deep/c.png", "beside/d.png", "beside/er/e.png")
    write_lines(tmp_path / "metadata.jsonl", [("a.png", "1"), ("deep/b.png", "2"), ("x.png", "3")])
    write_lines(tmp_path / "deep" / "metadata.jsonl", [("b.png", "4"), ("gone.png", "5")])
    write_lines(tmp_path / "beside" / "metadata.jsonl", [("d.png", "6"), ("er/e.png", "7")])
    assert read_captions(tmp_path) == {
        "a.png": "1", "x.png": "3", "deep/b.png": "4", "deep/c.png": None, "deep/gone.png": "5",
        "beside/d.png": "6", "beside/er/e.png": "7",
    }  # fmt: skip


def test_one_table_above_all_splits(tmp_path):
    make_images(tmp_path, "train/a.png", "validation/b.png")
    rows = [
        ("train/a.png", "1"),
        ("validation/b.png", "2"),
        ("train/gone.png", "3"),
        ("c.png", "4"),
    ]
    write_lines(tmp_path / "metadata.jsonl", rows)
    found = find_captioned_files(tmp_path / "train", is_split=True)
    assert {file.name: file.caption for file in found} == {
        "../c.png": "4", "a.png": "1", "gone.png": "3"
    }  # fmt: skip
    assert [finding.kind for finding in found[0].findings] == ["outside"]
    assert find_kinds(tmp_path / "train") == {"a.png": ["no-caption"]}


@pytest.mark.parametrize(
    ("value", "kind", "message"),
    [
        (42, "no-caption", "42 is no text"),
        (["a", "b"], "no-caption", "no text"),
        ("\ud83d shoe", "unreadable-caption", "half of a character"),
        (None, "no-caption", "empty in metadata.jsonl"),
    ],
)
def test_what_is_no_caption(tmp_path, value, kind, message):
    make_images(tmp_path, "a.png")
    write_jsonl(tmp_path, [{"file_name": "a.png", "text": value}])
    (file,) = find_captioned_files(tmp_path)
    assert file.caption is None
    assert [finding.kind for finding in file.findings] == [kind]
    assert message in file.findings[0].message


def test_the_shortest_path_to_a_file_counts_however_it_is_written(tmp_path):
    make_images(tmp_path, "a.png", "images/b.png", "c.png")
    names = [str(tmp_path / "a.png"), "./images/../images//b.png", "deep/../c.png", "./a.png"]
    write_jsonl(tmp_path, [{"file_name": n, "text": "a shoe"} for n in names])
    assert find_kinds(tmp_path) == {"a.png": [], "images/b.png": [], "c.png": []}


def test_the_first_column_that_says_something(tmp_path):
    make_images(tmp_path, "a.png")
    write_jsonl(tmp_path, [{"file_name": "", "image": "a.png", "text": None, "caption": "a shoe"}])
    assert read_captions(tmp_path) == {"a.png": "a shoe"}


@pytest.mark.parametrize("table", ["metadata.jsonl", "captions.json"])
def test_a_table_that_is_no_file(tmp_path, table):
    make_images(tmp_path, "a.png")
    (tmp_path / "a.txt").write_text("a shoe")
    (tmp_path / table).symlink_to(tmp_path / "nowhere")
    with pytest.raises(ValidationError, match=f"{table}: is no file that can be read"):
        find_captioned_files(tmp_path)
    (tmp_path / table).unlink()
    os.mkfifo(tmp_path / table)
    with pytest.raises(ValidationError, match=f"{table}: is no file that can be read"):
        find_captioned_files(tmp_path)


def test_endings_in_capitals(tmp_path):
    make_images(tmp_path, "A.PNG")
    (tmp_path / "A.TXT").write_text("a shoe")
    assert read_captions(tmp_path) == {"A.PNG": "a shoe"}


@pytest.mark.parametrize("forms", [("NFC", "NFD"), ("NFD", "NFC")])
def test_an_accent_apart_from_its_letter(tmp_path, forms):
    """As an archive from a Mac has it."""
    on_disk, in_table = (unicodedata.normalize(form, "tênis.png") for form in forms)
    make_images(tmp_path, f"images/{on_disk}")
    write_jsonl(tmp_path, [{"file_name": in_table, "text": "a shoe"}])
    assert find_kinds(tmp_path) == {f"images/{on_disk}": []}


def test_a_name_that_no_disk_takes_is_a_file_that_is_missing(tmp_path):
    make_images(tmp_path, "a.png")
    names = ["a.png", "x" * 300 + ".png", "a\0b.png"]
    write_jsonl(tmp_path, [{"file_name": name, "text": "a shoe"} for name in names])
    assert sorted(read_captions(tmp_path)) == sorted(names)

import json
import shutil
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_images import make_folder, make_image, make_splits, write_jsonl
from torch.utils.data import DataLoader

from sdkit import ImageCaptionDataset, ValidationError
from sdkit.finetuning.dataset_report import DatasetReport
from sdkit.mini.catalogue import COLOURS

PHOTOGRAPHS = Path(__file__).parents[2] / "shared" / "data" / "casual_shoes"


def read(folder, **options):
    return ImageCaptionDataset(folder, **{"resolution": 32, "progress": False, **options})


def read_quietly(folder, **options):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return read(folder, **options)


def test_an_example(tmp_path):
    make_splits(tmp_path)
    dataset = read(tmp_path)
    assert len(dataset) == 4
    example = dataset[1]
    assert example.name == "train/001.png" and example.caption == "shoe number 1"
    assert example.image.shape == (3, 32, 32) and example.image.dtype == torch.float32
    with Image.open(tmp_path / "train" / "001.png") as image:
        pixels = np.asarray(image.resize((32, 32), Image.Resampling.LANCZOS))
    expected = torch.tensor(pixels).permute(2, 0, 1).float() / 127.5 - 1
    assert torch.equal(example.image, expected)
    assert dataset[-1].name == "train/003.png"
    with pytest.raises(IndexError):
        dataset[4]
    assert [e.name for e in dataset] == list(dataset.names)


@pytest.mark.parametrize("folder", [None, "mini"])
def test_the_catalogue_is_white_where_there_is_no_shoe(folder):
    train, validation = read(folder), read(folder, split="validation")
    assert len(train) == 200 and len(validation) == 40
    assert not set(train.digests) & set(validation.digests)
    assert all("on white, white studio" in caption for caption in train.captions)
    assert {c for c in COLOURS if any(c in caption for caption in train.captions)} == set(COLOURS)
    images = torch.stack([train[i].image for i in range(20)])
    assert (images[:, :, 0, :] == 1).all() and images.min() < 0
    assert train.fingerprint == read(folder).fingerprint != validation.fingerprint


def test_one_folder_is_split_by_a_seed(tmp_path):
    make_folder(tmp_path, 20)
    parts = [read(tmp_path, split=split) for split in ("train", "validation", "test")]
    assert [len(part) for part in parts] == [14, 3, 3]
    names = [name for part in parts for name in part.names]
    assert sorted(names) == [f"{i:03d}.png" for i in range(20)]


def test_a_duplicate_is_in_no_two_splits(tmp_path):
    make_folder(tmp_path, 20)
    for i in range(20):
        shutil.copy(tmp_path / f"{i:03d}.png", tmp_path / f"copy_{i:03d}.png")
    write_jsonl(tmp_path, [{"file_name": p.name, "text": "shoe"} for p in tmp_path.glob("*.png")])
    parts = [read_quietly(tmp_path, split=split) for split in ("train", "validation", "test")]
    digests = [digest for part in parts for digest in part.digests]
    assert len(digests) == len(set(digests)) == 20


def plant(folder):
    """One bad file of every kind beside four good ones; returns {name: kind}."""
    make_folder(folder, 4)
    entries = [{"file_name": f"{i:03d}.png", "text": f"shoe {i}"} for i in range(4)]
    whole = make_image(50, (64, 64))
    whole.save(folder / "cut.jpg")
    (folder / "cut.jpg").write_bytes((folder / "cut.jpg").read_bytes()[:-60])
    (folder / "empty.png").touch()
    (folder / "text.png").write_text("<html>")
    make_image(51, (31, 64)).save(folder / "tiny.png")
    Image.new("RGB", (40, 40)).save(folder / "black.png")
    make_image(0).save(folder / "twice.bmp")  # the picture of 000.png in another format
    make_image(52).save(folder / "silent.png")
    make_image(53).save(folder / "blank.png")
    planted = {
        "cut.jpg": "truncated", "empty.png": "empty-file", "text.png": "not-an-image",
        "tiny.png": "too-small", "black.png": "all-black", "twice.bmp": "duplicate",
        "gone.png": "missing", "../out.png": "outside", "blank.png": "no-caption",
    }  # fmt: skip
    entries += [{"file_name": n, "text": "" if n == "blank.png" else "shoe"} for n in planted]
    write_jsonl(folder, entries)
    return {**planted, "silent.png": "no-caption"}


def test_every_planted_file_is_named_with_its_kind_and_the_rest_is_used(tmp_path):
    planted = plant(tmp_path / "train")
    with pytest.warns(UserWarning, match="10 skipped") as caught:
        dataset = read(tmp_path)
    assert Path(caught[0].filename).name == Path(__file__).name
    assert len(dataset) == 4
    found = {file.name: [f.kind for f in file.findings] for file in dataset.report.skipped}
    assert found == {f"train/{name}": [kind] for name, kind in planted.items()}
    assert len(dataset.report.files) == 14
    shown = str(dataset.report)
    assert all(name in shown for name in found)
    assert "4 of 14 files used, 0 of them changed, 10 skipped" in shown
    assert DatasetReport.from_json(dataset.report.to_json()) == dataset.report


def test_strict_names_every_file(tmp_path):
    planted = plant(tmp_path / "train")
    with pytest.raises(ValidationError, match="10 of 14 files") as error:
        read(tmp_path, strict=True)
    assert all(name in str(error.value) and kind in str(error.value)
               for name, kind in planted.items())  # fmt: skip
    make_splits(tmp_path / "good")
    assert len(read(tmp_path / "good", strict=True)) == 4


def test_strict_refuses_what_else_would_be_changed(tmp_path):
    make_splits(tmp_path)
    path = tmp_path / "train" / "000.png"
    make_image(0).convert("RGBA").save(path)
    with pytest.warns(UserWarning, match="1 of them changed, 0 skipped"):
        dataset = read(tmp_path)
    (file,) = dataset.report.changed
    assert file.name == "train/000.png" and file.is_used and len(dataset) == 4
    with pytest.raises(ValidationError, match=r"train/000\.png: alpha"):
        read(tmp_path, strict=True)


def test_tokens_that_do_not_fit_are_counted(tmp_path, tiny_pipe):
    make_folder(tmp_path / "train", 2)
    long = "a" * 100  # the tiny tokenizer knows letters alone: so many tokens, and two at the ends
    write_jsonl(
        tmp_path / "train",
        [{"file_name": "000.png", "text": long}, {"file_name": "001.png", "text": "a" * 75}],
    )
    with pytest.warns(UserWarning, match="102 tokens, of which the text encoder takes 77: 25 cut"):
        dataset = read(tmp_path, tokenizer=tiny_pipe.tokenizer)
    assert [file.tokens_cut for file in dataset.report.files] == [25, 0]
    assert dataset.report.tokens_cut == 25 and len(dataset) == 2
    assert read(tmp_path).report.tokens_cut is None
    with pytest.raises(ValidationError, match="caption-cut"):
        read(tmp_path, tokenizer=tiny_pipe.tokenizer, strict=True)


def test_the_fingerprint_follows_pixels_captions_and_resolution(tmp_path):
    folder = make_splits(tmp_path / "a") / "train"
    first = read(tmp_path / "a").fingerprint
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    assert read(tmp_path / "b").fingerprint == first
    assert read(tmp_path / "a", resolution=40).fingerprint != first
    entries = [json.loads(line) for line in (folder / "metadata.jsonl").read_text().splitlines()]
    write_jsonl(folder, [{**entries[0], "text": "another"}, *entries[1:]])
    assert read(tmp_path / "a").fingerprint != first
    write_jsonl(folder, entries)
    assert read(tmp_path / "a").fingerprint == first
    image = make_image(2)
    image.putpixel((20, 20), (0, 255, 0))
    image.save(folder / "002.png")
    assert read(tmp_path / "a").fingerprint != first


def test_a_file_that_changes_after_the_check_is_an_error(tmp_path):
    make_splits(tmp_path)
    dataset = read(tmp_path)
    make_image(77).save(tmp_path / "train" / "002.png")
    (tmp_path / "train" / "003.png").unlink()
    assert dataset[1].caption == "shoe number 1"
    with pytest.raises(ValidationError, match=r"002\.png: changed since it was checked"):
        dataset[2]
    with pytest.raises(ValidationError, match=r"003\.png: changed .*no such file"):
        dataset[3]


def test_data_loaders_read_it_in_processes(tmp_path):
    make_splits(tmp_path, train=6)
    loader = DataLoader(read(tmp_path), batch_size=3, num_workers=2, collate_fn=list)
    assert [e.name for batch in loader for e in batch] == [f"train/{i:03d}.png" for i in range(6)]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"split": "dev"}, "expected one of train"),
        ({"resolution": 0}, "resolution=0: expected a whole number"),
        ({"resolution": 32.5}, "resolution=32.5"),
    ],
)
def test_settings_that_cannot_be(options, message):
    with pytest.raises(ValidationError, match=message):
        read(None, **options)


def test_folders_that_cannot_be(tmp_path):
    with pytest.raises(ValidationError, match="no such folder"):
        read(tmp_path / "nowhere")
    (tmp_path / "file").touch()
    with pytest.raises(ValidationError, match="is not a folder"):
        read(tmp_path / "file")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValidationError, match="0 of 0 images can be used. Expected at least 2"):
        read(tmp_path / "empty")
    make_folder(tmp_path / "one", 1)
    with pytest.raises(ValidationError, match="1 of 1 images can be used"):
        read(tmp_path / "one")
    make_folder(tmp_path / "tiny", 3, size=(16, 16))
    with pytest.raises(ValidationError, match=r"0 of 3 images.*\n.*000\.png: too-small, 16x16"):
        read(tmp_path / "tiny")
    make_folder(tmp_path / "split" / "train")
    with pytest.raises(ValidationError, match="no folder validation"):
        read(tmp_path / "split", split="validation")


@pytest.mark.skipif(not PHOTOGRAPHS.is_dir(), reason="the photographs are not on this machine")
def test_real_photographs():
    dataset = read_quietly(PHOTOGRAPHS, split="validation", resolution=128)
    assert len(dataset) + len(dataset.report.skipped) == 427
    assert {f.kind for file in dataset.report.skipped for f in file.findings} <= {"duplicate"}
    assert dataset[0].image.shape == (3, 128, 128)
    assert all("casual shoes" in caption for caption in dataset.captions)

import pytest

from sdkit.finetuning.splits import SPLITS, check_split, draw_split, find_split_folder
from sdkit.validation import ValidationError

NAMES = [f"{i:03d}.png" for i in range(100)]


def test_every_name_is_in_one_split():
    parts = [draw_split(NAMES, split) for split in SPLITS]
    assert [len(part) for part in parts] == [70, 15, 15]
    assert sorted(sum(parts, [])) == NAMES
    assert all(part == sorted(part) for part in parts)


def test_the_seed_decides():
    assert draw_split(NAMES, "train") == draw_split(NAMES, "train", seed=42)
    assert draw_split(NAMES, "train") != draw_split(NAMES, "train", seed=43)
    assert draw_split(NAMES[::-1], "test") == draw_split(NAMES, "test")[::-1]


def test_a_name_more_moves_few_others():
    before, after = (set(draw_split(names, "train")) for names in (NAMES, [*NAMES, "new.png"]))
    assert len(before - after) <= 2


@pytest.mark.parametrize(
    ("count", "sizes"),
    [(0, [0, 0, 0]), (1, [1, 0, 0]), (2, [1, 1, 0]), (3, [2, 1, 0]), (4, [2, 1, 1])],
)
def test_small_sets_have_a_held_out_image(count, sizes):
    assert [len(draw_split(NAMES[:count], split)) for split in SPLITS] == sizes


@pytest.mark.parametrize("name", ["validation", "val", "valid"])
def test_folders_that_say_so(tmp_path, name):
    assert find_split_folder(tmp_path, "train") is None
    (tmp_path / "train").mkdir()
    with pytest.raises(ValidationError, match="has train, but no folder validation"):
        find_split_folder(tmp_path, "validation")
    (tmp_path / name).mkdir()
    assert find_split_folder(tmp_path, "validation") == tmp_path / name


def test_an_unknown_split():
    with pytest.raises(ValidationError, match="'dev': expected one of train, validation, test"):
        check_split("dev")

"""Grids: what they expand to, and what is refused with its line, before anything runs."""

import json

import numpy as np
import pytest

from sdkit.batch.grid import read_grid
from sdkit.validation import ValidationError


def expand(content):
    return read_grid(content).expand()


def write(tmp_path, text):
    path = tmp_path / "grid.yaml"
    path.write_text(text)
    return path


def test_lists_are_combined_and_the_last_turns_fastest():
    runs = expand({"fixed": {"c": "x"}, "grid": {"a": [1, 2], "b": ["p", "q"]}})
    assert [(run["a"], run["b"]) for run in runs] == [(1, "p"), (1, "q"), (2, "p"), (2, "q")]
    assert {run["c"] for run in runs} == {"x"}


def test_only_fixed_values_are_one_run():
    assert expand({"fixed": {"a": 1}}) == [{"a": 1}]


@pytest.mark.parametrize(
    ("text", "values"),
    [
        ("{from: 0, to: 8, step: 4}", [0, 4, 8]),
        ("{from: 0, to: 9, step: 4}", [0, 4, 8]),
        ("{from: 3, to: 1, step: -1}", [3, 2, 1]),
        ("{from: 0.1, to: 0.3, step: 0.1}", [0.1, 0.2, 0.3]),
        ("{from: 1, to: 2, count: 3}", [1.0, 1.5, 2.0]),
        ("{from: 1e-5, to: 1e-3, count: 3, spacing: log}", [1e-5, 1e-4, 1e-3]),
    ],
)
def test_ranges_include_both_ends(tmp_path, text, values):
    found = [run["a"] for run in expand(write(tmp_path, f"grid: {{a: {text}}}"))]
    assert found == values
    assert [type(value) for value in found] == [type(value) for value in values]


def test_zipped_groups_go_together():
    runs = expand({"grid": {"s": [0, 1]}, "zip": [{"rank": [4, 8], "alpha": [4, 16]}]})
    assert [(r["s"], r["rank"], r["alpha"]) for r in runs] == [
        (0, 4, 4), (0, 8, 16), (1, 4, 4), (1, 8, 16),
    ]  # fmt: skip


def test_a_zipped_group_may_repeat_a_value_but_not_a_combination():
    group = {"rank": [4, 4, 8], "alpha": [4, 8, 8]}
    assert [tuple(run.values()) for run in expand({"zip": [group]})] == [(4, 4), (4, 8), (8, 8)]
    with pytest.raises(ValidationError, match="rank = 4, alpha = 8 is there twice"):
        expand({"zip": [{"rank": [4, 8, 4], "alpha": [8, 8, 8]}]})


def test_excluded_combinations_are_left_out():
    runs = expand({"grid": {"a": [1, 2], "b": [1, 2]}, "exclude": [{"a": 1, "b": 2}]})
    assert [(run["a"], run["b"]) for run in runs] == [(1, 1), (2, 1), (2, 2)]


def test_true_is_not_one():
    assert len(expand({"grid": {"a": [True, 1]}})) == 2
    assert [run["a"] for run in expand({"grid": {"a": [True, 1]}, "exclude": [{"a": 1}]})] == [True]
    nested = {"grid": {"a": [[True], [1], {"b": 1}, {"b": True}]}}
    assert len(expand(nested)) == 4
    assert len(expand(nested | {"exclude": [{"a": [1]}]})) == 3
    with pytest.raises(ValidationError, match="is there twice"):
        expand({"grid": {"a": [[1, {"b": 2}], [1.0, {"b": 2}]]}})


def test_nan_is_itself():
    nan = float("nan")
    assert expand({"grid": {"a": [1, nan]}, "exclude": [{"a": nan}]}) == [{"a": 1}]
    with pytest.raises(ValidationError, match="a = nan is there twice"):
        expand({"grid": {"a": [nan, float("nan")]}})


def test_a_long_range_is_refused_at_once():
    """Each value compared with each would take an hour."""
    with pytest.raises(ValidationError, match="50000 runs, expected at most 500"):
        expand({"grid": {"a": {"from": 1, "to": 50_000, "step": 1}}})


def test_plain_values_are_those_of_yaml_1_2(tmp_path):
    text = 'fixed: {a: 1e-4, b: on, c: 010, d: 2026-01-01, e: true, f: ~, g: "1", h: 1:30}'
    (run,) = expand(write(tmp_path, text))
    assert run == {
        "a": 1e-4, "b": "on", "c": 10, "d": "2026-01-01", "e": True, "f": None, "g": "1",
        "h": "1:30",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "an empty grid"),
        ("[1]", "an empty grid"),
        ("grid:\n  a: [1, 2\n  b: [3]", "grid.yaml, line 3: not valid YAML"),
        ("a: [1]", "grid.yaml, line 1: 'a' is not known here"),
        ("grid:\n  a: [1]\n  a: [2]", "grid.yaml, line 2: a is there twice"),
        ("fixed: {a: 1}\ngrid:\n  a: [1]", "grid.yaml, line 1: a is given twice"),
        ("grid:\n  a: 1", "grid.yaml, line 2: a is 1, expected a list"),
        ("grid:\n  a: []", "line 2: a is [], expected a list"),
        ("grid:\n  a: [1, 2, 1]", "a = 1 is there twice"),
        ("grid:\n  a: &b [1, *b]", "line 2: an anchor (&) that contains itself"),
        ("grid:\n  a: {from: 0, to: 1e308, step: 1e-300}", "a leaves the numbers that a float"),
        ("grid:\n  a: {from: -1e308, to: 1e308, count: 3}", "a leaves the numbers that a float"),
        ("grid: {}\nmax_runs: 3", "an empty grid, it names no parameter"),
        ("zip:\n  - {a: [1, 2], b: [1]}", "expected as many of each"),
        ("grid:\n  a: {from: 0, to: 8}", "expected numbers for from, to and either step or count"),
        ("grid:\n  a: {from: 0, to: 8, step: -1}", "a step that leads from one to the other"),
        ("grid:\n  a: {from: 0, to: 1, count: 3, spacing: log}", "numbers above 0"),
        ("grid:\n  a: {from: 0, to: 1, count: 1}", "a count of 2 or more"),
        ("grid:\n  a: {from: 0, to: 1e9, step: 1e-3}", "has 1000000000001 values"),
        ("grid:\n  a: [1]\nexclude:\n  - {b: 1}", "exclude names ['b']"),
        ("grid:\n  a: [1]\nexclude:\n  - {a: 2}", "meets no run"),
        ("grid:\n  a: [1]\nexclude:\n  - {a: 1}", "no run is left"),
        ("max_runs: many", "max_runs is 'many'"),
        ("fixed: 3", "fixed is 3, expected `name: value`"),
    ],
    ids=str,
)
def test_what_is_no_grid_is_refused_with_its_line(tmp_path, text, message):
    with pytest.raises(ValidationError) as refused:
        expand(write(tmp_path, text))
    assert message in str(refused.value)


def test_a_grid_larger_than_sense_says_its_number_and_how_to_mean_it(tmp_path):
    text = "grid: {a: {from: 1, to: 30, step: 1}, b: {from: 1, to: 30, step: 1}}"
    with pytest.raises(ValidationError, match="900 runs, expected at most 500.*`max_runs: 900`"):
        expand(write(tmp_path, text))
    assert len(expand(write(tmp_path, f"{text}\nmax_runs: 900"))) == 900


def test_a_missing_file_names_the_grids_of_the_package(tmp_path):
    with pytest.raises(ValidationError, match="dtype_scheduler_steps.*report_ablation"):
        read_grid(tmp_path / "nothing.yaml")


def test_a_grid_of_python_is_the_same(tmp_path):
    content = {"fixed": {"p": ["x"]}, "grid": {"a": [1, 2]}}
    assert expand(content) == expand(write(tmp_path, json.dumps(content)))


def test_what_python_has_instead_of_lists_and_text_is_taken(tmp_path):
    content = {
        "fixed": {"p": tmp_path, "s": (64, (48, 32))},
        "grid": {"a": range(3), "b": np.array([0.5, 1.0])},
    }
    run = expand(content)[-1]
    assert run == {"p": str(tmp_path), "s": [64, [48, 32]], "a": 2, "b": 1.0}
    assert type(run["b"]) is float

"""The grid: lists, ranges, zipped groups and excluded combinations, as a list of runs' values.

A grid is YAML with these keys, each of which may be missing:

    fixed:                       # the same in every run
      backend: cpu
    grid:                        # every combination of these
      dtype: [float32, float16]
      seed: {from: 0, to: 8, step: 4}
      learning_rate: {from: 1e-5, to: 1e-3, count: 3, spacing: log}
    zip:                         # these go together, value by value
      - {rank: [4, 8], alpha: [4, 8]}
    exclude:                     # combinations to leave out
      - {dtype: float16, rank: 8}
    max_runs: 500
"""

import itertools
import math
import os
from dataclasses import dataclass, field
from pathlib import Path

from sdkit.batch.grid_file import parse_grid
from sdkit.validation import ValidationError

KEYS = ("fixed", "grid", "zip", "exclude", "max_runs")
BUNDLED = Path(__file__).parent.parent / "grids"
MAX_RUNS = 500
SIGNIFICANT_DIGITS = 12  # of what a range computes: 0.3, not 0.30000000000000004


@dataclass(frozen=True)
class Grid:
    """A grid that was read and is well-formed; nothing is known of its notebook yet.

    Attributes:
        name: Of the file, for messages.
        fixed: {name: value} of every run.
        axes: One tuple of choices each, a choice being {name: value, ...}; the first turns slowest.
        exclude: {name: value, ...} each: a run with all of these is left out.
        max_runs: More runs are refused.
        lines: {name: line in the file}, where that is known.
    """

    name: str
    fixed: dict
    axes: tuple
    exclude: tuple
    max_runs: int = MAX_RUNS
    lines: dict = field(default_factory=dict)

    def where(self, name):
        """Returns "grid.yaml, line 7" for a parameter, as far as it is known."""
        line = self.lines.get(name)
        return f"{self.name}, line {line}" if line else self.name

    def expand(self):
        """Returns the values of each run, {name: value} of fixed and varied ones, in grid order.

        Raises:
            ValidationError: Too many, none left, twice the same, or an exclusion of nothing.
        """
        count = math.prod(len(axis) for axis in self.axes)
        if count > self.max_runs:
            raise ValidationError(
                f"{self.name}: {count} runs, expected at most {self.max_runs}. Leave values out, "
                f"or write `max_runs: {count}` into the grid if you mean it."
            )
        combinations = [
            {**self.fixed, **{name: value for choice in choices for name, value in choice.items()}}
            for choices in itertools.product(*self.axes)
        ]
        for excluded in self.exclude:
            if not any(_matches(run, excluded) for run in combinations):
                raise ValidationError(
                    f"{self.name}: exclude {excluded} meets no run. Expected values that the grid "
                    "has, written as they are there."
                )
        runs = [run for run in combinations if not any(_matches(run, e) for e in self.exclude)]
        if not runs:
            raise ValidationError(
                f"{self.name}: no run is left after `exclude`. Exclude fewer combinations."
            )
        return runs


def read_grid(source):
    """Reads a grid.

    Args:
        source: A YAML file, the name of a grid in `sdkit/grids/`, or a dict with the same keys.

    Raises:
        ValidationError: It is not there, no YAML, or no grid; the message names the line.
    """
    if isinstance(source, dict):
        return _build_grid(_as_yaml(source), "grid", {})
    if not isinstance(source, (str, os.PathLike)) or not str(source):
        raise ValidationError(
            f"grid: got {type(source).__name__} {source!r:.80}, expected a YAML file, the name of "
            f"a grid of the package, or a dict with some of {', '.join(KEYS)}."
        )
    path = find_grid(source)
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ValidationError(f"{path}: cannot be read as a grid ({error}).") from error
    content, lines = parse_grid(text, path.name)
    return _build_grid(content, path.name, lines)


def _as_yaml(value):
    """A grid of Python in YAML's words: a tuple, a range or an array is a list, a path is text."""
    if hasattr(value, "tolist"):  # numpy's and torch's
        value = value.tolist()
    if isinstance(value, dict):
        return {key: _as_yaml(item) for key, item in value.items()}
    if isinstance(value, (list, tuple, range)):
        return [_as_yaml(item) for item in value]
    return str(value) if isinstance(value, os.PathLike) else value


def find_grid(source):
    """Returns the path of a grid: a file, or one of the package by its name."""
    if Path(source).is_file():
        return Path(source)
    path = BUNDLED / f"{Path(source).stem}.yaml"
    if path.is_file() and len(Path(source).parts) == 1:
        return path
    names = ", ".join(sorted(found.stem for found in BUNDLED.glob("*.yaml")))
    raise ValidationError(f"{source}: no such file. Expected a grid in YAML, or one of {names}.")


def _build_grid(content, name, lines):
    if not isinstance(content, dict) or not content:
        raise ValidationError(
            f"{name}: an empty grid. Expected some of {', '.join(KEYS)}; sdkit/grids/ has examples."
        )
    unknown = [key for key in content if key not in KEYS]
    if unknown:
        line = f", line {lines[unknown[0]]}" if unknown[0] in lines else ""
        raise ValidationError(
            f"{name}{line}: {unknown[0]!r} is not known here. Expected {', '.join(KEYS)}; "
            "parameters stand below fixed, grid or zip."
        )
    grid = Grid(name, {}, (), (), lines=lines)
    fixed = _check_mapping(content.get("fixed"), "fixed", grid)
    axes = [
        _check_differ([{key: value} for value in _read_values(value, key, grid)], grid)
        for key, value in _check_mapping(content.get("grid"), "grid", grid).items()
    ]
    for group in _check_list(content.get("zip"), "zip", grid):
        axes.append(_zip_group(_check_mapping(group, "zip", grid), grid))
    names = [*fixed, *(key for axis in axes for key in axis[0])]
    twice = [key for key in names if names.count(key) > 1]
    if twice:
        raise ValidationError(
            f"{grid.where(twice[0])}: {twice[0]} is given twice. Expected it in one place of "
            "fixed, grid and zip."
        )
    exclude = tuple(
        _check_mapping(entry, "exclude", grid)
        for entry in _check_list(content.get("exclude"), "exclude", grid)
    )
    for entry in exclude:
        strange = [key for key in entry if key not in names]
        if strange or not entry:
            raise ValidationError(
                f"{grid.where('exclude')}: exclude names {strange or 'nothing'}, expected "
                f"parameters of this grid: {', '.join(names)}."
            )
    max_runs = content.get("max_runs", MAX_RUNS)
    if type(max_runs) is not int or max_runs < 1:
        raise ValidationError(f"{grid.where('max_runs')}: max_runs is {max_runs!r}, expected 1 up.")
    if not names:
        raise ValidationError(
            f"{name}: an empty grid, it names no parameter. Expected `name: value` below fixed, or "
            "`name: [value, ...]` below grid or zip; sdkit/grids/ has examples."
        )
    return Grid(name, fixed, tuple(axes), exclude, max_runs, lines)


def _check_mapping(value, key, grid):
    if value is None:
        return {}
    if not isinstance(value, dict) or not all(isinstance(name, str) for name in value):
        raise ValidationError(f"{grid.where(key)}: {key} is {value!r}, expected `name: value`.")
    return value


def _check_list(value, key, grid):
    if value is None:
        return []
    if not isinstance(value, list):
        raise ValidationError(f"{grid.where(key)}: {key} is {value!r}, expected a list of `- ...`.")
    return value


def _zip_group(group, grid):
    values = {name: _read_values(value, name, grid) for name, value in group.items()}
    lengths = {name: len(found) for name, found in values.items()}
    if len(set(lengths.values())) != 1:
        raise ValidationError(
            f"{grid.where(next(iter(group), 'zip'))}: zipped values are {lengths} long, expected "
            "as many of each."
        )
    choices = [dict(zip(values, each, strict=True)) for each in zip(*values.values(), strict=True)]
    return _check_differ(choices, grid)


def _check_differ(choices, grid):
    """Returns the choices of an axis; of a zipped one only the whole may not be there twice."""
    seen = set()
    for choice in choices:
        if _key_of(choice) in seen:
            told = ", ".join(f"{name} = {value!r:.80}" for name, value in choice.items())
            raise ValidationError(f"{grid.where(next(iter(choice)))}: {told} is there twice.")
        seen.add(_key_of(choice))
    return tuple(choices)


def _read_values(value, name, grid):
    """Returns the values of one axis: those of a list, or those that a range means."""
    if isinstance(value, dict) and {"from", "to"} <= set(value):
        try:
            value = _read_range(value, name, grid)
        except OverflowError as error:
            raise ValidationError(
                f"{grid.where(name)}: the range {value} of {name} leaves the numbers that a float "
                "can hold."
            ) from error
    if not isinstance(value, list) or not value:
        raise ValidationError(
            f"{grid.where(name)}: {name} is {value!r}, expected a list [...] with something in it, "
            "or a range {from: 0, to: 8, step: 4}. One value for all runs stands below fixed."
        )
    return value


def _read_range(value, name, grid):
    """Returns the numbers from `from` to `to`, both included, by `step` or `count` of them."""
    start, stop = value["from"], value["to"]
    step, count, spacing = value.get("step"), value.get("count"), value.get("spacing", "linear")
    numbers = [n for n in (start, stop, step, count) if n is not None]
    problem = None
    if not all(type(n) in (int, float) and math.isfinite(n) for n in numbers) or len(numbers) != 3:
        problem = "numbers for from, to and either step or count"
    elif set(value) - {"from", "to", "step", "count", "spacing"} or spacing not in (
        "linear",
        "log",
    ):
        problem = "from, to, step or count, and spacing: linear or log"
    elif step is not None and (spacing == "log" or step == 0 or (stop - start) / step < 0):
        problem = "a step that leads from one to the other; for spacing: log a count"
    elif count is not None and (type(count) is not int or count < 2):
        problem = "a count of 2 or more"
    elif spacing == "log" and (start <= 0 or stop <= 0):
        problem = "numbers above 0 for spacing: log"
    if problem:
        raise ValidationError(
            f"{grid.where(name)}: the range {value} of {name}; expected {problem}."
        )
    if step is not None:
        # The last one is there where it is met but for rounding.
        count = math.floor((stop - start) / step + 1e-9) + 1  # of infinity: OverflowError
    if count > 100 * MAX_RUNS:  # before they are all written down
        raise ValidationError(
            f"{grid.where(name)}: the range {value} of {name} has {count} values."
        )
    if step is not None:
        numbers = [start + i * step for i in range(count)]
    elif spacing == "log":
        numbers = [start * (stop / start) ** (i / (count - 1)) for i in range(count)]
    else:
        numbers = [start + (stop - start) * i / (count - 1) for i in range(count)]
    if step is not None and type(start) is int and type(step) is int:
        return numbers
    if not all(map(math.isfinite, numbers)):
        raise OverflowError
    return [float(f"{number:.{SIGNIFICANT_DIGITS}g}") for number in numbers]


def _matches(run, excluded):
    return all(_key_of(run[name]) == _key_of(value) for name, value in excluded.items())


def _key_of(value):
    """What tells a value from others: 1 is 1.0, but not true, in lists and maps too.

    NaN is itself here, or it could be neither excluded nor found twice.
    """
    if isinstance(value, dict):
        return frozenset((name, _key_of(item)) for name, item in value.items())
    if isinstance(value, list):
        return tuple(map(_key_of, value))
    if isinstance(value, int | float) and not isinstance(value, bool) and value == value:
        return value
    return type(value), repr(value)

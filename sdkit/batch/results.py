"""What came out: one row a run, read from the runs' folders, so that it holds after any ending."""

import json
import os
from pathlib import Path

import pandas as pd

from sdkit.batch.execution import DONE, FAILURES, RUNS, read_run
from sdkit.batch.plan import PLAN_NAME
from sdkit.run_folder import METRICS_NAME, VERDICTS_NAME, replace_file
from sdkit.validation import ValidationError

WAITING = "waiting"
LEADING = ("verdicts", "images_valid", "images")
TRAILING = (
    "seconds", "cpu_seconds", "peak_memory_gib", "attempts", "kernel", "error", "failed_cell",
    "failed_source", "path",
)  # fmt: skip
CSV_NAME, PARQUET_NAME = "results.csv", "results.parquet"


def load_results(folder):
    """Reads a sweep back, one that was interrupted too.

    Args:
        folder: What `run_sweep` or `sdkit sweep` wrote.

    Returns:
        A DataFrame, one row a run in grid order: `run_id`, `status` ("done", "failed",
        "kernel-died", "timeout" or "waiting"), `good` (done, and nothing invalid in it), a column
        for each parameter of the grid, each number that the notebook left in `metrics.json` as
        "metric: ...", each answer of its verdicts as "verdict: ...", `images_valid`, `images`,
        `seconds`, `cpu_seconds`, `peak_memory_gib`, `attempts`, `kernel`, `error`, `failed_cell`
        (counted from 0 in the source), `failed_source`, and `path` of the run's folder below
        `folder`. `attrs["varied"]` names the parameters that differ between runs.

    Raises:
        ValidationError: There is no sweep.
    """
    if not isinstance(folder, (str, os.PathLike)):
        raise ValidationError(f"folder: got {folder!r:.80}, expected the path of a sweep's folder.")
    folder = Path(folder)
    try:
        plan = json.loads((folder / PLAN_NAME).read_text(encoding="utf-8"))
        first, notebook = list(plan["runs"][0]["values"]), str(plan["notebook"])
        if any(list(run["values"]) != first for run in plan["runs"]):
            raise ValueError("its runs have different parameters")
        names = [name_column(name) for name in first]
        varied = [names[first.index(name)] for name in plan["varied"]]
        rows = [_read_row(folder, run) for run in plan["runs"]]
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise ValidationError(
            f"{folder}: no sweep there ({PLAN_NAME}: {type(error).__name__}: {error}). Expected a "
            "folder that sdkit sweep wrote; the same sweep, started again, writes it anew."
        ) from error
    order = ["run_id", "status", "good", *names, *LEADING]
    table = pd.DataFrame(rows)
    for name in names:  # a 7 beside a null stays 7, which pandas by itself makes 7.0
        values = [row[name] for row in rows]
        if len({type(value) for value in values}) > 1:
            table[name] = pd.Series(values, dtype=object)
    found = [name for name in table if name not in (*order, *TRAILING)]
    table = table[[*order, *found, *TRAILING]]
    table["failed_cell"] = table["failed_cell"].astype("Int64")
    table.attrs = {"varied": varied, "notebook": notebook}
    return table


def name_column(name):
    """Returns the column of a parameter: its name, unless a result has that name."""
    taken = name in ("run_id", "status", "good", *LEADING, *TRAILING)
    return f"parameter: {name}" if taken else name


def list_rows(table):
    """Returns a table's rows as dicts in which what is missing is None, whatever its column."""
    return table.astype(object).where(table.notna(), None).to_dict("records")


def save_results(table, folder):
    """Writes the table as CSV and as parquet, and returns both paths.

    A list or a map in a cell is written as JSON: parquet holds one type a column.
    """
    plain = table.copy()
    for name in filter(lambda name: pd.api.types.is_object_dtype(plain[name]), plain):
        kinds = {type(value) for value in plain[name] if value is not None}
        if kinds == {int} and all(abs(value or 0) < 2**63 for value in plain[name]):
            plain[name] = plain[name].astype("Int64")
        elif kinds - {str} and kinds != {bool}:
            plain[name] = [None if value is None else _as_text(value) for value in plain[name]]
    paths = Path(folder) / CSV_NAME, Path(folder) / PARQUET_NAME
    with replace_file(paths[0]) as temporary:
        plain.to_csv(temporary, index=False)
    with replace_file(paths[1]) as temporary:
        plain.to_parquet(temporary, index=False)
    return paths


def _as_text(value):
    return value if isinstance(value, str) else json.dumps(value)


def _read_row(folder, run):
    row = {
        "run_id": run["run_id"], "status": WAITING, "good": False,
        **{name_column(name): value for name, value in run["values"].items()},
        **dict.fromkeys((*LEADING, *TRAILING)),
    }  # fmt: skip
    for place in (RUNS, FAILURES):
        path = folder / place / run["run_id"]
        record = read_run(path)
        if record:
            found = _read_output(path / "output") if record["status"] == DONE else {"good": False}
            return {**row, **record, **found, "path": f"{place}/{run['run_id']}"}
    return row


def _read_output(output):
    """What a notebook left; where it cannot be read the run is not good, and says why."""
    try:
        return _tell_output(output)
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        told = f"its results cannot be read ({type(error).__name__}: {error})"
        return {"good": False, "error": told}


def _tell_output(output):
    """Verdicts decide whether a run is good, else its images, else nothing."""
    verdicts = _read_json(output / VERDICTS_NAME) or []
    record = _read_json(output / "record.json")
    images = record["images"] if record else []
    valid = sum(image["valid"] for image in images)
    expected = sum(bool(verdict["as_expected"]) for verdict in verdicts)
    metrics = _read_json(output / METRICS_NAME) or {}
    return {
        "good": expected == len(verdicts) if verdicts else valid == len(images),
        "verdicts": f"{expected} of {len(verdicts)} as expected" if verdicts else None,
        "images_valid": valid if images else None,
        "images": len(images) or None,
        **{f"metric: {name}": value for name, value in metrics.items()},
        **{f"verdict: {verdict['question']}": verdict["answer"] for verdict in verdicts},
    }


def _read_json(path):
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None

"""`make bench`: every benchmark, side by side with its baseline, as one table and one CSV.

    python tests/benchmarks/run.py [--only NAME]

Exits with 1 if a ratio breaks its limit.
"""

import argparse
import importlib
import importlib.metadata
import operator
import os
import sys
from pathlib import Path

import pandas as pd

HERE = Path(__file__).parent
CSV_PATH = HERE.parent.parent / "figures" / "benchmarks.csv"
WHAT = ["benchmark", "case", "baseline", "ours"]  # a row of the CSV is replaced by a newer one
RELATIONS = {"<=": operator.le, ">=": operator.ge}


def main() -> None:
    """Runs `measure()` of every `bench_*.py`, or of one: the other rows of the CSV stay."""
    names = [path.stem.removeprefix("bench_") for path in sorted(HERE.glob("bench_*.py"))]
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", choices=names, metavar="NAME", help=", ".join(names))
    only = parser.parse_args().only
    rows = []
    for name in [only] if only else names:
        print(f"{name} ...", file=sys.stderr)
        rows += importlib.import_module(f"bench_{name}").measure()
    table = make_table(rows)
    save_table(table, keep_others=bool(only))
    print(table.to_string(index=False, na_rep="", float_format="{:.4g}".format))
    broken = find_broken_limits(table)
    sys.exit("\n".join(broken) or None)  # a text is printed, and makes the status 1


def save_table(table, *, keep_others):
    """Writes the CSV; with `keep_others` the rows that it has and `table` has not stay."""
    CSV_PATH.parent.mkdir(exist_ok=True)
    if keep_others and CSV_PATH.exists():
        table = pd.concat([pd.read_csv(CSV_PATH), table])
        table = table[~table.duplicated(WHAT, keep="last")]
    table.to_csv(CSV_PATH, index=False, float_format="%.5g")


def make_table(rows):
    """Returns the rows as a DataFrame, judged against their limits.

    Args:
        rows: Of each a `ratio` and, unless it has none, a `limit` such as ">= 20" or "<= 1.03".

    Returns:
        The rows, with `within`: "yes", "no", or "" where there is no limit.
    """
    table = pd.DataFrame([{"limit": "", **row} for row in rows])
    table["within"] = [_judge(*pair) for pair in zip(table["ratio"], table["limit"], strict=True)]
    table["torch"], table["cores"] = importlib.metadata.version("torch"), os.cpu_count()
    return table


def find_broken_limits(table):
    """Returns one line for each ratio that breaks its limit."""
    return [
        f"{row.benchmark}, {row.case}: ratio {row.ratio:.4g}, expected {row.limit}"
        for row in table[table["within"] == "no"].itertuples()
    ]


def _judge(ratio, limit):
    if not limit:
        return ""
    relation, bound = limit.split()
    return "yes" if RELATIONS[relation](ratio, float(bound)) else "no"


if __name__ == "__main__":
    main()

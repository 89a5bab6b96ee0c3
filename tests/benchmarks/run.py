"""`make bench`: every benchmark, side by side with its baseline, as one table and one CSV."""

import importlib
import os
import sys
from pathlib import Path

import pandas as pd
import torch

HERE = Path(__file__).parent
CSV_PATH = HERE.parent.parent / "figures" / "benchmarks.csv"


def main() -> None:
    """Runs `measure()` of every `bench_*.py`."""
    sys.path.insert(0, str(HERE))
    rows = []
    for path in sorted(HERE.glob("bench_*.py")):
        print(f"{path.stem} ...", file=sys.stderr)
        rows += importlib.import_module(path.stem).measure()
    table = pd.DataFrame(rows)
    table["torch"], table["cores"] = torch.__version__, os.cpu_count()
    CSV_PATH.parent.mkdir(exist_ok=True)
    table.to_csv(CSV_PATH, index=False, float_format="%.5g")
    print(table.to_string(index=False, float_format="{:.4g}".format))


if __name__ == "__main__":
    main()

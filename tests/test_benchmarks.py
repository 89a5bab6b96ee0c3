"""The benchmarks' verdict on made-up ratios; nothing is timed here."""

import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest

FOLDER = Path(__file__).parent / "benchmarks"
RUN = runpy.run_path(str(FOLDER / "run.py"))
PAIRS = runpy.run_path(str(FOLDER / "pairs.py"))


@pytest.mark.parametrize(
    ("ratio", "limit", "within"),
    [
        (1.02, "<= 1.03", "yes"),
        (1.03, "<= 1.03", "yes"),
        (1.04, "<= 1.03", "no"),
        (27.0, ">= 20", "yes"),
        (19.9, ">= 20", "no"),
        (float("nan"), ">= 20", "no"),
        (float("nan"), "<= 1.03", "no"),
        (0.05, "", ""),
    ],
)
def test_a_ratio_is_judged_by_its_limit(ratio, limit, within):
    row = {"benchmark": "guard", "case": "8 steps", "ratio": ratio, "limit": limit}
    table = RUN["make_table"]([row])
    assert list(table["within"]) == [within]
    broken = RUN["find_broken_limits"](table)
    expected = f"guard, 8 steps: ratio {ratio:.4g}, expected {limit}"
    assert broken == ([expected] if within == "no" else [])


def test_a_row_need_not_have_a_limit():
    rows = [{"benchmark": "a", "ratio": 1.0, "limit": ">= 20"}, {"benchmark": "b", "ratio": 1.0}]
    table = RUN["make_table"](rows)
    assert list(table["limit"]) == [">= 20", ""] and list(table["within"]) == ["no", ""]


def test_one_slow_pair_does_not_move_the_ratio():
    measured = [(1.0, 1.01), (1.0, 9.0), (2.0, 2.02), (9.0, 1.0), (1.0, 1.01)]
    assert PAIRS["summarize"](measured)["ratio"] == pytest.approx(1.01)
    assert PAIRS["summarize"](measured, speedup=True)["ratio"] == pytest.approx(1 / 1.01)


def test_pairs_alternate_their_order_and_keep_to_the_budget():
    calls = []
    sides = (lambda: calls.append("baseline"), lambda: calls.append("ours"))
    measured = PAIRS["measure_pairs"](*sides, pairs=4)
    assert calls == ["ours", *(["ours", "baseline", "baseline", "ours"] * 2)]
    assert len(measured) == 4
    assert len(PAIRS["measure_pairs"](*sides, pairs=99, budget_seconds=1e-9)) == 3


@pytest.fixture
def made_up(tmp_path):
    """A copy of run.py beside two benchmarks with a fixed result; the first breaks its limit."""
    folder = tmp_path / "tests" / "benchmarks"
    folder.mkdir(parents=True)
    shutil.copy(FOLDER / "run.py", folder)
    for name, ratio, limit in (("slow", 1.5, "<= 1.03"), ("free", 0.1, "")):
        row = {
            "benchmark": name, "case": "made up", "baseline": "theirs", "ours": "ours",
            "ratio": ratio, "limit": limit,
        }  # fmt: skip
        (folder / f"bench_{name}.py").write_text(f"def measure():\n    return [{row!r}]\n")
    return folder


@pytest.mark.parametrize(
    ("arguments", "status", "said"),
    [
        ((), 1, "slow, made up: ratio 1.5, expected <= 1.03"),
        (("--only", "free"), 0, "free ..."),
        (("--only", "fast"), 2, "invalid choice: 'fast'"),
    ],
    ids=str,
)
def test_the_exit_status_tells_a_broken_limit(made_up, arguments, status, said):
    command = [sys.executable, made_up / "run.py", *arguments]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (run.returncode, said in run.stderr) == (status, True), run.stderr
    csv_path = made_up.parent.parent / "figures" / "benchmarks.csv"
    assert csv_path.exists() == (status < 2)
    if status == 1:
        table = pd.read_csv(csv_path, keep_default_na=False).set_index("benchmark")
        assert table[["limit", "within"]].loc["slow"].tolist() == ["<= 1.03", "no"]
        assert table[["limit", "within"]].loc["free"].tolist() == ["", ""]


def test_one_benchmark_alone_replaces_its_own_rows(made_up):
    csv_path = made_up.parent.parent / "figures" / "benchmarks.csv"
    command = [sys.executable, made_up / "run.py"]
    subprocess.run(command, capture_output=True, check=False)
    free = made_up / "bench_free.py"
    free.write_text(free.read_text().replace("0.1", "0.2"))
    subprocess.run([*command, "--only", "free"], capture_output=True, check=True)
    table = pd.read_csv(csv_path).set_index("benchmark")
    assert table["ratio"].to_dict() == {"slow": 1.5, "free": 0.2}

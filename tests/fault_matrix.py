"""The fault matrix: every planted fault and every healthy run, diagnosed and marked.

    python tests/fault_matrix.py [--fast] [--only WORD]

Prints one line a case, and what was found where it is not the truth; the full campaign also writes
figures/fault_matrix.png and figures/fault_matrix.csv. Exits with 1 if anything is wrong.
"""

import argparse
import logging
import os
import sys
import tempfile
import warnings
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import matplotlib.pyplot as plt
import pandas as pd
from healthy import HEALTHY
from planted import PLANTED
from planted_mini import PLANTED_IN_MINI
from tiny_pipelines import write_tokenizer
from tqdm import tqdm

from sdkit.diagnosis import CAUSES
from sdkit.figures import BAD, GOOD, GRID, figure_style, save_figure
from sdkit.run_folder import replace_file

FIGURES = Path(__file__).parent.parent / "figures"
ASPECTS = ("stage", "step", "module", "cause")
LAST = ("healthy", "undecided", "raised")  # the last where a diagnosis itself failed
SHOWN_CAUSES = (*(cause for cause in CAUSES if cause not in LAST), *LAST)


@dataclass(frozen=True)
class Truth:
    """What a diagnosis must say; `also` holds other (step, module) that are as true."""

    stage: str
    step: int | None
    module: str | None
    cause: str
    also: tuple = ()


@dataclass(frozen=True)
class Mark:
    """One case: the truth, what was found, and which aspects are right."""

    case: str
    truth: Truth
    found: Truth

    @property
    def right(self):
        """{aspect: whether it is right}; a step and a module are right together."""
        places = ((self.truth.step, self.truth.module), *self.truth.also)
        is_place = (self.found.step, self.found.module) in places
        return {
            "stage": self.found.stage == self.truth.stage,
            "step": is_place or self.found.step == self.truth.step,
            "module": is_place or self.found.module == self.truth.module,
            "cause": self.found.cause == self.truth.cause,
        }

    @property
    def is_right(self):
        return all(self.right.values())


HEALTH = Truth("none", None, None, "healthy")


def make_truth(case):
    return Truth(case.stage, case.step, case.module, case.cause, case.also)


def mark_planted(case, tokenizer_folder):
    """Diagnose one planted fault."""
    with case.build(tokenizer_folder) as (pipe, pipe_kwargs):
        return Mark(case.name, make_truth(case), find(pipe, case.prompts, **pipe_kwargs))


def mark_healthy(case, tokenizer_folder):
    """Diagnose one healthy run."""
    with case.build(tokenizer_folder) as (pipe, pipe_kwargs):
        found = find(pipe, case.prompts, seed=case.seed, **pipe_kwargs)
        return Mark(case.name, HEALTH, found)


def try_case(mark, case, tokenizer_folder):
    """Mark a case; a diagnosis that raises is a wrong answer and does not end the campaign."""
    try:
        return mark(case, tokenizer_folder)
    except Exception as error:
        print(f"{case.name}: {type(error).__name__}: {error}", file=sys.stderr)
        truth = HEALTH if mark is mark_healthy else make_truth(case)
        return Mark(case.name, truth, Truth("raised", None, None, "raised"))


def find(pipe, prompts, **pipe_kwargs):
    """What `diagnose` says, reduced to what can be marked."""
    from sdkit import diagnose

    diagnosis = diagnose(pipe, prompts, **pipe_kwargs)
    return Truth(*(getattr(diagnosis, aspect) for aspect in ASPECTS))


def make_table(marks):
    """One row a case."""
    rows = []
    for mark in marks:
        truth, found = asdict(mark.truth), asdict(mark.found)
        rows.append(
            {"case": mark.case}
            | {f"true_{aspect}": truth[aspect] for aspect in ASPECTS}
            | {f"found_{aspect}": found[aspect] for aspect in ASPECTS}
            | {"right": mark.is_right}
        )
    table = pd.DataFrame(rows)
    return table.astype({"true_step": "Int64", "found_step": "Int64"})


def print_matrix(marks):
    """The cases under each other, then the counts."""
    width = max(len(mark.case) for mark in marks)
    for mark in marks:
        print(f"{'right' if mark.is_right else 'WRONG'}  {mark.case:{width}}  {say(mark.truth)}")
        if not mark.is_right:
            print(f"{'':{width + 7}}  found {say(mark.found)}")
    faults = [mark for mark in marks if mark.truth is not HEALTH]
    healthy = [mark for mark in marks if mark.truth is HEALTH]
    alarms = sum(mark.found != HEALTH for mark in healthy)
    print(f"\nplanted faults: {sum(m.is_right for m in faults)} of {len(faults)} right")
    print(f"healthy runs: {alarms} false alarms in {len(healthy)}")


def say(truth):
    step = "" if truth.step is None else f" at step {truth.step}"
    return f"{truth.cause}: {truth.module or truth.stage}{step}"


def draw_matrix(marks):
    """Causes planted against causes found, and beside it how often each aspect was right.

    Returns:
        A closed Figure.
    """
    counts = Counter((mark.truth.cause, mark.found.cause) for mark in marks)
    planted = [cause for cause in SHOWN_CAUSES if any(true == cause for true, _ in counts)]
    found = [c for c in SHOWN_CAUSES if c in planted or any(seen == c for _, seen in counts)]
    with figure_style():
        figure, (left, right) = plt.subplots(
            1, 2, figsize=(10.5, 0.34 * len(planted) + 1.9), sharey=True,
            width_ratios=(len(found), 1.6 * len(ASPECTS)), layout="constrained",
        )  # fmt: skip
        plt.close(figure)
        for row, true in enumerate(planted):
            for column, seen in enumerate(found):
                draw_cell(left, row, column, counts[true, seen], is_good=true == seen)
            of_cause = [mark for mark in marks if mark.truth.cause == true]
            for column, aspect in enumerate(ASPECTS):
                rights = sum(mark.right[aspect] for mark in of_cause)
                text = f"{rights}/{len(of_cause)}"
                draw_cell(right, row, column, text, is_good=rights == len(of_cause))
        for axes, names, title in (
            (left, found, "cause found (columns) for each cause planted (rows)"),
            (right, ASPECTS, "right in"),
        ):
            axes.set(xlim=(-0.5, len(names) - 0.5), title=title)
            axes.set_xticks(range(len(names)), names, rotation=40, ha="right")
            axes.tick_params(length=0)
            axes.spines[:].set_visible(False)
        left.set_ylim(len(planted) - 0.5, -0.5)
        left.set_yticks(range(len(planted)), planted)
    return figure


def draw_cell(axes, row, column, value, *, is_good):
    """One rounded-off square with its number; pale where there is nothing to count."""
    colour = GRID if value == 0 else GOOD if is_good else BAD
    box = plt.Rectangle((column - 0.46, row - 0.44), 0.92, 0.88, color=colour)
    box.set_alpha(0.45 if value == 0 else 1.0)
    axes.add_patch(box)
    if value:
        axes.text(column, row, value, ha="center", va="center", color="white", fontsize=8)


def main():
    """Runs the campaign, prints it, and draws it if it was the whole one."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--fast", action="store_true", help="the short campaign of make test")
    parser.add_argument("--only", default="", metavar="WORD", help="cases with this in their name")
    chosen = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    work = [(mark_planted, case) for case in (*PLANTED, *PLANTED_IN_MINI)]
    work += [(mark_healthy, case) for case in HEALTHY]
    work = [
        (mark, case)
        for mark, case in work
        if chosen.only in case.name and (case.fast or not chosen.fast)
    ]
    if not work:
        sys.exit(f"no case has {chosen.only!r} in its name")
    with tempfile.TemporaryDirectory() as folder:
        tokenizer_folder = write_tokenizer(Path(folder))
        marks = [try_case(mark, case, tokenizer_folder) for mark, case in tqdm(work, unit="case")]
    print_matrix(marks)
    if not chosen.fast and not chosen.only:
        with replace_file(FIGURES / "fault_matrix.csv") as temporary:
            make_table(marks).to_csv(temporary, index=False)
        print(save_figure(draw_matrix(marks), FIGURES / "fault_matrix.png"))
    sys.exit(not all(mark.is_right for mark in marks))


if __name__ == "__main__":
    main()

"""Two functions timed side by side: in turn, in pairs, so that other programs slow both alike."""

import statistics
import time


def measure_pairs(baseline, ours, *, pairs, least=3, budget_seconds=None, clock=time.perf_counter):
    """Times both in alternating order, after one call of `ours` that is not counted.

    Args:
        baseline: What is compared with.
        ours: What is compared.
        pairs: How often, unless the budget ends first.
        least: Pairs that are timed whatever the budget.
        budget_seconds: Begin no further pair after so long; None is no limit.
        clock: Such as `time.process_time`, which other programs' load does not reach.

    Returns:
        [(seconds of the baseline, seconds of ours)], one for each pair.
    """
    ours()
    started, measured = time.perf_counter(), []
    while len(measured) < pairs:
        spent_seconds = time.perf_counter() - started
        if budget_seconds and len(measured) >= least and spent_seconds > budget_seconds:
            break
        order = (baseline, ours) if len(measured) % 2 else (ours, baseline)
        seconds = {function: _measure_seconds(function, clock) for function in order}
        measured.append((seconds[baseline], seconds[ours]))
    return measured


def summarize(measured, *, speedup=False):
    """Returns the medians of the pairs, and of each pair's own ratio, as columns of a row.

    Args:
        measured: What `measure_pairs` returned.
        speedup: Whether `ratio` is baseline over ours, above 1 where ours is faster; else ours over
            baseline, what ours costs.
    """
    ratios = [before / after if speedup else after / before for before, after in measured]
    return {
        "baseline_seconds": statistics.median(before for before, _ in measured),
        "ours_seconds": statistics.median(after for _, after in measured),
        "ratio": statistics.median(ratios),
        "pairs": len(measured),
    }


def _measure_seconds(function, clock):
    started = clock()
    function()
    return clock() - started

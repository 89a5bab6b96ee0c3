"""Looking at a run without its model: `explore_run` step by step, `compare_runs` side by side."""

from sdkit.exploration.comparison import compare_runs
from sdkit.exploration.explorer import explore_run

__all__ = ["compare_runs", "explore_run"]

"""A pipeline's own progress bar, put out for a while."""

from contextlib import contextmanager


@contextmanager
def without_progress_bar(pipe):
    """Inside, a pipeline draws no bar of its own."""
    own = getattr(pipe, "_progress_bar_config", None)
    pipe.set_progress_bar_config(**{**(own or {}), "disable": True})
    try:
        yield
    finally:
        pipe._progress_bar_config = own or {}  # where there was none, diffusers sets {} itself

"""Warnings of a run: kept for its record, and shown once each at its end, never lost.

The report's black images had announced themselves with one warning that nobody read.
"""

import logging
import warnings
from collections import Counter

# How numpy says that NaN or Inf was cast to an integer; in an image that makes black pixels.
CAST_WARNING = "invalid value encountered in cast"
LOGGERS = ("diffusers", "transformers")  # what these warn of goes to their logs


class CaughtWarnings:
    """Context manager that keeps Python's warnings and what diffusers and transformers log.

    Python's are held back; `show` shows them. Logged ones appear at once, as always.
    """

    def __init__(self):
        """Makes an empty collection."""
        self.logged = []
        self.python = []
        self._handler = logging.Handler(level=logging.WARNING)
        self._handler.emit = self.logged.append

    def __enter__(self):
        """Starts to listen."""
        self._catching = warnings.catch_warnings(record=True)
        self.python = self._catching.__enter__()
        warnings.simplefilter("always")  # a repeated one is counted, an ignored one recorded
        for name in LOGGERS:
            logging.getLogger(name).addHandler(self._handler)
        return self

    def __exit__(self, *error):
        """Stops to listen."""
        for name in LOGGERS:
            logging.getLogger(name).removeHandler(self._handler)
        self._catching.__exit__(*error)

    @property
    def has_cast_warning(self):
        """Whether numpy cast NaN or Inf to an integer."""
        return any(CAST_WARNING in str(caught.message) for caught in self.python)

    def count(self):
        """Returns {"category", "message", "count"} of each different warning."""
        pairs = [(caught.category.__name__, str(caught.message)) for caught in self.python]
        pairs += [(f"log of {log.name}", log.getMessage()) for log in self.logged]
        return tuple(
            {"category": category, "message": message, "count": count}
            for (category, message), count in Counter(pairs).items()
        )

    def show(self):
        """Shows each of Python's warnings once, through the filters of the caller."""
        different = {(c.category, str(c.message), c.filename, c.lineno): c for c in self.python}
        for caught in different.values():
            warnings.warn_explicit(caught.message, caught.category, caught.filename, caught.lineno)

"""The search for a set of layers from which none can be dropped, by trials that each cost a run."""

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from sdkit.validation import ValidationError

# One image is 3 dB better or worse by chance (standard deviation; see `sdkit.precision.rounding`).
CHANCE_DB = 6.0


@dataclass
class Search:
    """Trials of sets of layers, each run once.

    Attributes:
        measure: Runs with these layers in float32 and returns the least PSNR in dB, -inf if an
            image is not finite.
        target_db: What a valid set reaches.
        bar: Progress bar of the runs.
        look_again: Returns a better measured target; asked once, when a finite trial falls short of
            `target_db` by no more than chance. None if there is none.
        measured: {set of layers: dB}.
    """

    measure: Callable
    target_db: float
    bar: object
    look_again: Callable | None = None
    measured: dict = field(default_factory=dict)

    @property
    def trials(self) -> int:
        """Runs so far."""
        return len(self.measured)

    def is_valid(self, paths) -> bool:
        """Whether these layers in float32 suffice.

        What broke with more of them in float32 is not run again: less does not make it finite.
        """
        key = frozenset(paths)
        if key not in self.measured:
            if any(key < tried for tried, db in self.measured.items() if db == -np.inf):
                return False
            self.measured[key] = self.measure(key)
            self.bar.update()
        short = self.target_db - self.measured[key]
        if 0 < short <= CHANCE_DB and self.look_again:
            look_again, self.look_again = self.look_again, None
            self.target_db = min(self.target_db, look_again())
        return self.measured[key] >= self.target_db

    def find_least(self, layers, endangered, tiers, beyond=()) -> list[str]:
        """A valid set of layers, none of which can be dropped.

        Args:
            layers: All, the most endangered first.
            endangered: Heads of that list by headroom, growing.
            tiers: Where to look if none of these suffices: the VAE, attention, both.
            beyond: The head of `layers` whose numbers the dtype cannot hold: hardly to be dropped,
                so each of them is tried alone and last.

        Raises:
            ValidationError: Nothing less than everything suffices, or not even that.
        """
        if self.is_valid([]):
            return []
        enough = next((head for head in endangered if self.is_valid(head)), None)
        if enough is None:
            tier = next((tier for tier in tiers if tier and self.is_valid(tier)), layers)
            if not self.is_valid(tier):
                self._give_up("even with every layer in float32")
            enough = self._shorten([path for path in layers if path in set(tier)])
        found = self._drop(enough, frozenset(beyond))
        if len(found) == len(layers):
            self._give_up("with less than every layer in float32")
        return found

    def _shorten(self, ordered):
        """The shortest valid head of an ordered list, as far as validity grows with length."""
        low, high = 0, 1
        while high < len(ordered) and not self.is_valid(ordered[:high]):
            low, high = high, 2 * high
        high = min(high, len(ordered))
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (low, middle) if self.is_valid(ordered[:middle]) else (middle, high)
        return ordered[:high]

    def _drop(self, paths, beyond):
        """Drops halves, quarters, ... and in the end single layers, until none can be dropped."""
        spared = sum(path in beyond for path in paths)
        size = max(1, (len(paths) - spared) // 2)
        while True:
            dropped = False
            lowest = spared if size > 1 else 0
            for start in range(len(paths) - size, lowest - 1, -size):  # the least endangered first
                rest = paths[:start] + paths[start + size :]
                if self.is_valid(rest):
                    paths, dropped = rest, True
            if size == 1 and not dropped:
                return paths
            size = max(1, size // 2)

    def _give_up(self, what):
        best = max(self.measured.values())
        reached = "no finite image" if best == -np.inf else f"{best:.1f} dB"
        raise ValidationError(
            f"plan: {what} the best reached is {reached}, expected {self.target_db:.1f} dB. No "
            "recipe was written. Allow a greater tolerance_db, or find the cause with diagnose: "
            "a fault that float32 shares is none of precision."
        )


def count_bisect_trials(search, order) -> int:
    """Runs that a bisection over module order takes, as converters of graphs do it.

    The largest undecided segment goes to low precision if the run stays valid, else it is halved; a
    single layer that cannot go stays in float32. Runs that the search has made count too.
    """
    kept, undecided, trials = set(order), [list(order)], 0
    while undecided:
        segment = max(undecided, key=len)
        undecided.remove(segment)
        trials += 1
        if search.is_valid(kept - set(segment)):
            kept -= set(segment)
        elif len(segment) > 1:
            middle = len(segment) // 2
            undecided += [segment[:middle], segment[middle:]]
    return trials

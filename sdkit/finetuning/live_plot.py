"""Losses as they come in: a picture that is drawn anew while a notebook's cell runs."""

import time

import matplotlib.pyplot as plt
import numpy as np

from sdkit.figures import COLOURS, QUIET, figure_style

MEAN_STEPS = 20  # a loss of 16 random timesteps is mostly the luck of the draw
REDRAW_SECONDS = 5.0  # a drawing takes a tenth of a second


class LivePlot:
    """Context manager that draws the losses of a training below a notebook's cell.

    with LivePlot() as live:
        report = train_lora(config, on_step=live.note)

    Attributes:
        losses: (step, loss) of each step that was taken.
        validation_losses: (steps taken, loss) of each look at the held-out images.
        dropped: Steps that were not taken.
    """

    def __init__(self, *, every_seconds=REDRAW_SECONDS):
        """Prepares an empty plot.

        Args:
            every_seconds: Between two drawings; the last is always drawn.
        """
        self.losses, self.validation_losses, self.dropped = [], [], []
        self._every_seconds, self._drawn_at, self._handle = every_seconds, -float("inf"), None

    def __enter__(self):
        """Starts."""
        return self

    def __exit__(self, *error):
        """Draws what there is at the end, after an error too."""
        self._draw()

    def note(self, record):
        """Takes the TrainedStep of a step; for `train_lora(on_step=...)`."""
        if record.dropped:
            self.dropped.append(record.step)
        else:
            self.losses.append((record.step, record.loss))
        if record.validation_loss is not None:
            self.validation_losses.append((record.step + 1, record.validation_loss))
        if time.monotonic() - self._drawn_at > self._every_seconds:
            self._draw()

    def _draw(self):
        from IPython.display import display

        figure = plot_training(self.losses, self.validation_losses, self.dropped)
        if self._handle:
            self._handle.update(figure)
        else:  # None outside of a notebook, where nothing can be drawn over
            self._handle = display(figure, display_id=True)
        self._drawn_at = time.monotonic()


def plot_training(losses, validation_losses=(), dropped=()):
    """Draws the losses of a training.

    Args:
        losses: (step, loss) of each step that was taken.
        validation_losses: (steps taken, loss) of each look at the held-out images.
        dropped: Steps that were not taken.

    Returns:
        A new Figure, already closed: return it from a cell to see it, or save it.
    """
    with figure_style():
        figure, ax = plt.subplots(figsize=(7.5, 3.2))
        plt.close(figure)
        plot_losses(ax, losses, validation_losses, dropped)
    return figure


def plot_losses(ax, losses, validation_losses=(), dropped=()):
    """Draws each loss, their running mean, and the validation losses; returns the Axes."""
    steps, values = np.array(losses, dtype=float).reshape(-1, 2).T
    ax.plot(steps, values, ".", color=QUIET, markersize=2.5, alpha=0.6, label="one step")
    if len(values) >= MEAN_STEPS:
        means = np.convolve(values, np.ones(MEAN_STEPS) / MEAN_STEPS, mode="valid")
        ax.plot(
            steps[MEAN_STEPS - 1 :], means, color=COLOURS[0], label=f"mean of {MEAN_STEPS} steps"
        )
    if validation_losses:
        ax.plot(*zip(*validation_losses, strict=True), "o-", color=COLOURS[1], label="held out")
    for place, step in enumerate(dropped):
        ax.axvline(step, color=COLOURS[3], label=None if place else "dropped", linewidth=1)
    ax.set(xlabel="steps", ylabel="loss", title="What it learns")
    if len(values):
        ax.legend(loc="center left", bbox_to_anchor=(1, 0.5))
    return ax

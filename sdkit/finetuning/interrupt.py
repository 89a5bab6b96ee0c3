"""Ctrl-C between two steps, never within one: what is half done would be lost or wrong."""

import signal
import threading


class InterruptWatch:
    """Context manager that notes the first Ctrl-C (or a polite kill) instead of raising.

    The second Ctrl-C stops at once. Outside of the main thread Python takes no handlers, so there
    nothing is caught.

    Attributes:
        is_requested: Whether the run was asked to stop.
    """

    SIGNALS = (signal.SIGINT, signal.SIGTERM)

    def __init__(self):
        """Prepares a watch that has seen nothing."""
        self.is_requested = False
        self._previous = {}

    def __enter__(self):
        """Starts to listen."""
        if threading.current_thread() is threading.main_thread():
            self._previous = {name: signal.signal(name, self._note) for name in self.SIGNALS}
        return self

    def __exit__(self, *error):
        """Puts the handlers back that were there."""
        for name, handler in self._previous.items():
            signal.signal(name, handler)

    def _note(self, number, frame):
        if self.is_requested:
            raise KeyboardInterrupt
        self.is_requested = True

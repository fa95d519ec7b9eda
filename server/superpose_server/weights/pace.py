"""How much a long job does before it lets others go on."""

from __future__ import annotations

# About 3 ms of hashing: what a check adds to a step while it lasts.
_SLICE_BYTES = 1 << 22


class Pace:
    """Counts work, so that a slice is neither long nor so small that a job takes for ever.

    A step runs one slice: hundreds of small ones would take as many steps.
    """

    def __init__(self) -> None:
        """Begin a slice."""
        self._bytes = 0

    def due(self, done: int) -> bool:
        """Return whether a slice is full with `done` more bytes; then another one begins."""
        self._bytes += done
        if self._bytes < _SLICE_BYTES:
            return False
        self._bytes = 0
        return True

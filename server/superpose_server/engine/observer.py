"""What the engine tells of itself while it runs: the seam between engine and metrics."""

from __future__ import annotations

from superpose_adapters.mix import BoundMix
from superpose_server.engine.sequence import FinishReason, Sequence
from superpose_server.weights.resident import Findings


class EngineObserver:
    """Receives events on the engine thread; each method must be quick. Does nothing by itself."""

    def stepped(self, rows: tuple[Sequence, ...], waiting: int, corrected: int) -> None:
        """A decode step ran over `rows`, of which `corrected` needed a correction."""

    def prefilled(self, sequence: Sequence) -> None:
        """A row has its first token."""

    def finished(self, sequence: Sequence, reason: FinishReason) -> None:
        """A row ended."""

    def failed(self, sequence: Sequence, error: Exception) -> None:
        """A row ended with an error."""

    def folded(self, seconds: float, succeeded: bool, resident: BoundMix) -> None:
        """A fold ended; `resident` is in the weights now."""

    def weights_lost(self) -> None:
        """A fold left the weights as no mix, or a check had found damage when it was cut short."""

    def checked(self, found: Findings) -> None:
        """The weights were compared with what they should be."""

    def died(self) -> None:
        """The engine's thread ends, though nobody has stopped it; this is the last event."""


class Observers(EngineObserver):
    """Passes every event to several observers, in their order."""

    def __init__(self, *observers: EngineObserver) -> None:
        """Pass events to `observers`."""
        self._observers = observers

    def stepped(self, rows: tuple[Sequence, ...], waiting: int, corrected: int) -> None:
        """See `EngineObserver`."""
        for observer in self._observers:
            observer.stepped(rows, waiting, corrected)

    def prefilled(self, sequence: Sequence) -> None:
        """See `EngineObserver`."""
        for observer in self._observers:
            observer.prefilled(sequence)

    def finished(self, sequence: Sequence, reason: FinishReason) -> None:
        """See `EngineObserver`."""
        for observer in self._observers:
            observer.finished(sequence, reason)

    def failed(self, sequence: Sequence, error: Exception) -> None:
        """See `EngineObserver`."""
        for observer in self._observers:
            observer.failed(sequence, error)

    def folded(self, seconds: float, succeeded: bool, resident: BoundMix) -> None:
        """See `EngineObserver`."""
        for observer in self._observers:
            observer.folded(seconds, succeeded, resident)

    def weights_lost(self) -> None:
        """See `EngineObserver`."""
        for observer in self._observers:
            observer.weights_lost()

    def checked(self, found: Findings) -> None:
        """See `EngineObserver`."""
        for observer in self._observers:
            observer.checked(found)

    def died(self) -> None:
        """See `EngineObserver`."""
        for observer in self._observers:
            observer.died()

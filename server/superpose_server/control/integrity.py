"""Whether the weights can be served: what verifications and folds have found of them."""

from __future__ import annotations

from collections.abc import Callable

from superpose_server.engine.observer import EngineObserver
from superpose_server.weights.resident import ResidentWeights

Follower = Callable[[bool], None]


class Integrity(EngineObserver):
    """The newest finding, and those who are told of it. Any thread may note one, or ask."""

    def __init__(self, weights: ResidentWeights) -> None:
        """Begin with weights that are what they should be."""
        self._weights = weights
        self._found = True
        self._followers: tuple[Follower, ...] = ()

    @property
    def intact(self) -> bool:
        """False after a failed verification or a fold that ruined the weights, until one passes."""
        return self._found and not self._weights.lost

    def follow(self, follower: Follower) -> None:
        """Call `follower` with every finding, on the thread that made it."""
        self._followers = (*self._followers, follower)

    def note(self, intact: bool) -> None:
        """Remember a finding and tell whoever follows."""
        self._found = intact
        if intact:
            self._weights.lost = False
        for follower in self._followers:
            follower(intact)

    def weights_lost(self, error: Exception) -> None:
        """Note that a fold has ruined the weights, whoever asked for it."""
        self.note(False)

"""Whether texts can be served: what verifications, folds and the engine's end tell of it."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Protocol

from superpose_server.engine.observer import EngineObserver
from superpose_server.weights.resident import Findings


class Weights(Protocol):
    """What may be damaged, as `ResidentWeights` may.

    Attributes:
        intact: Whether texts may be made of it.
    """

    intact: bool


Follower = Callable[[bool], None]
_log = logging.getLogger(__name__)


class Integrity(EngineObserver):
    """What was found last, and those who are told of it. Any thread may ask.

    Attributes:
        hopeless: Why nothing but a new start helps; "" as long as something else may.
    """

    def __init__(self, weights: Weights) -> None:
        """Begin with weights that are what they should be."""
        self._weights = weights
        self._followers: tuple[Follower, ...] = ()
        self.hopeless = ""

    @property
    def intact(self) -> bool:
        """False from the first damage on that a check finds, or a fold does, until one passes."""
        return self._weights.intact

    def follow(self, follower: Follower) -> None:
        """Call `follower` with every finding, on the thread that made it."""
        self._followers = (*self._followers, follower)

    def checked(self, found: Findings) -> None:
        """Tell whoever follows what a check has found, and whether anything here can mend it."""
        if not found.ok:
            _log.error(
                "the weights are damaged resident=%s base=%s adapters=%s",
                *map(_listed, (found.damaged_resident, found.damaged_base, found.damaged_adapters)),
            )
        if found.lost:
            self.give_up(
                f"{_listed(found.lost)}: damaged in memory, and there is no other copy here to "
                "mend it from"
            )
        else:
            self._tell(self.intact and not self.hopeless)

    def give_up(self, why: str) -> None:
        """Note that only a new start helps, which reads everything again."""
        self.hopeless = self.hopeless or why
        self._tell(False)

    def weights_lost(self) -> None:
        """Note that the weights are damaged, whoever has found or done it."""
        self._tell(False)

    def died(self) -> None:
        """Note that there is no engine any more."""
        self.give_up("the engine's thread has died, the log says of what")

    def _tell(self, intact: bool) -> None:
        for follower in self._followers:
            follower(intact)


def _listed(names: tuple[str, ...]) -> str:
    more = len(names) - 3
    return ",".join(names[:3]) + (f",... ({more} more)" if more > 0 else "") or "none"

"""One replica's side of a change: prepare, then commit; whatever is lost, late or comes twice.

A change is prepared everywhere before it is committed anywhere, so that what cannot be done is
refused before anybody has done it. What was prepared binds nobody: it is folded when its commit
comes, and forgotten when another change comes. A replica that has missed either, because it is new
or was not reached, gets there at the next call, every one of which says what the mix should be.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, TypeVar

from superpose_server.cluster.desired import Desired, MixOfDigests, Order

Prepared = TypeVar("Prepared")


class Overruled(Exception):
    """A change is older than what is held, or another one of the same order.

    Attributes:
        held: What is held.
    """

    def __init__(self, held: Order) -> None:
        """Tell what is held."""
        super().__init__(f"a change of order {held} is held here")
        self.held = held


@dataclass(frozen=True)
class _Pending(Generic[Prepared]):
    mix: MixOfDigests
    prepared: Prepared


class Follower(Generic[Prepared]):
    """Holds one mix, and goes from one to the next; one call at a time.

    Attributes:
        held: What the last change made of it; the order of no change before the first.
    """

    def __init__(
        self,
        empty: MixOfDigests,
        prepare: Callable[[MixOfDigests], Prepared],
        fold: Callable[[Prepared], object],
    ) -> None:
        """Begin with the base.

        Args:
            empty: The mix of no adapters, which is resident.
            prepare: Makes what a fold needs and changes nothing; raises if it cannot.
            fold: Makes it resident.
        """
        self._prepare = prepare
        self._fold = fold
        self._pending: _Pending[Prepared] | None = None
        self.held = Desired(Order(), empty)

    def prepare(self, desired: Desired) -> Prepared:
        """Make ready for a change, and say what was prepared.

        Raises:
            Overruled: It comes too late.
            Exception: Whatever keeps this replica from that mix.
        """
        self._check(desired)
        if self._pending is None or self._pending.mix != desired.mix:
            self._pending = None
            self._pending = _Pending(desired.mix, self._prepare(desired.mix))
        return self._pending.prepared

    def reach(self, desired: Desired) -> None:
        """Hold what is desired, or something later.

        Raises:
            Overruled: Another mix is held under the same order.
            Exception: Whatever keeps this replica from that mix; it holds the one before.
        """
        if desired.order < self.held.order or desired == self.held:
            return
        if desired.mix != self.held.mix:
            self._fold(self.prepare(desired))
        else:
            self._check(desired)
        self._pending = None
        self.held = desired

    def _check(self, desired: Desired) -> None:
        if desired.order < self.held.order or (
            desired.order == self.held.order and desired.mix != self.held.mix
        ):
            raise Overruled(self.held.order)

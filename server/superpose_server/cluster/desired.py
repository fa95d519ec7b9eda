"""What every replica is to hold, as it goes between processes: names and digests, no tensors."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from superpose_adapters.adapter import Adapter
from superpose_adapters.mix import BoundEntry, BoundMix


@dataclass(frozen=True)
class NamedDigest:
    """An entry of a bound mix, whose adapter is called by its digest."""

    domain: str
    digest: str
    weight: float


@dataclass(frozen=True)
class MixOfDigests:
    """A bound mix without the adapters themselves.

    Attributes:
        base_digest: Of the base.
        digest: Of the mix; see `BoundMix`.
        entries: In the order of the fold.
    """

    base_digest: str
    digest: str
    entries: tuple[NamedDigest, ...] = ()

    @classmethod
    def of(cls, mix: BoundMix) -> MixOfDigests:
        """Return what `mix` is to those who have the adapters."""
        return cls(
            mix.base_digest,
            mix.digest,
            tuple(NamedDigest(e.domain, e.adapter.digest, e.weight) for e in mix.entries),
        )

    def bind(self, adapter_of: Callable[[str], Adapter]) -> BoundMix:
        """Return the bound mix again, of the adapters that `adapter_of` knows by their digests."""
        return BoundMix.of(
            self.base_digest,
            (BoundEntry(e.domain, adapter_of(e.digest), e.weight) for e in self.entries),
        )


@dataclass(frozen=True, order=True)
class Order:
    """When a change was made: of two, the later one holds.

    Attributes:
        term: Number of the server that made it, greater than that of every server before it.
        generation: Of the default mix, as that server counts.
    """

    term: int = 0
    generation: int = -1


@dataclass(frozen=True)
class Desired:
    """The mix that a change makes the default one; of one order there is one mix alone."""

    order: Order
    mix: MixOfDigests

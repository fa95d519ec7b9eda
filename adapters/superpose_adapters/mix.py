"""Mixes: which domains are summed, and with what weights.

A `Mix` speaks of names, as users do. A `BoundMix` speaks of adapters: it is what a mix meant at the
moment when it was resolved, and it goes on meaning that when a name is later given to other bytes.
Everything that lasts (running rows, the journal, the resident weights) holds bound mixes.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property

from superpose_adapters.adapter import Adapter
from superpose_adapters.digest import canonical_digest
from superpose_adapters.mix_syntax import check_weights


@dataclass(frozen=True)
class Mix:
    """An immutable {domain: weight}; order-free, weight 0 = absent; the empty mix is the base.

    A named mix may stand where a domain does: its weight multiplies those that the name stands for.
    `entries` is sorted by name, so equal mixes compare and hash equal.
    """

    entries: tuple[tuple[str, float], ...] = ()

    @classmethod
    def of(cls, weights: Mapping[str, float] | Iterable[tuple[str, float]]) -> Mix:
        """Build a mix from {domain: weight} or from pairs.

        Raises:
            ValueError: A bad name, a bad weight, or a name that comes twice.
        """
        checked = check_weights(weights.items() if isinstance(weights, Mapping) else weights)
        return cls(tuple(sorted((name, weight) for name, weight in checked.items() if weight != 0)))

    def __len__(self) -> int:
        """Return the number of entries."""
        return len(self.entries)


@dataclass(frozen=True)
class BoundEntry:
    """One domain of a bound mix: the name it was asked by, the adapter it meant, its weight."""

    domain: str
    adapter: Adapter
    weight: float


@dataclass(frozen=True)
class BoundMix:
    """A mix whose names are resolved to adapters.

    `entries` is in ascending (adapter digest, weight): the order of the digest and of the fold, so
    that the same mix gives the same bits whatever path led to it.
    """

    base_digest: str
    entries: tuple[BoundEntry, ...] = ()

    @classmethod
    def of(cls, base_digest: str, entries: Iterable[BoundEntry]) -> BoundMix:
        """Build a bound mix from entries in any order."""
        ordered = sorted(entries, key=lambda e: (e.adapter.digest, e.weight, e.domain))
        return cls(base_digest, tuple(ordered))

    @cached_property
    def weights(self) -> dict[Adapter, float]:
        """Weight of each distinct adapter, in the order of the fold.

        Two domains may name the same adapter; their weights add, in float64.
        """
        weights: dict[Adapter, float] = {}
        for entry in self.entries:
            weights[entry.adapter] = weights.get(entry.adapter, 0.0) + entry.weight
        return weights

    @cached_property
    def digest(self) -> str:
        """Sha256 of the base digest and the (adapter digest, weight) entries in fold order."""
        return canonical_digest(
            {
                "base": self.base_digest,
                "entries": [[e.adapter.digest, e.weight.hex()] for e in self.entries],
            }
        )

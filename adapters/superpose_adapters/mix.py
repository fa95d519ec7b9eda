"""Mixes: which domains are summed, and with what weights.

A `Mix` speaks of names, as users do. A `BoundMix` speaks of adapters: it is what a mix meant at the
moment when it was resolved, and it goes on meaning that when a name is later given to other bytes.
Everything that lasts (running rows, the journal, the resident weights) holds bound mixes.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property

from superpose_adapters.adapter import Adapter
from superpose_adapters.digest import canonical_digest

DOMAIN_PATTERN = re.compile(r"[a-z0-9][a-z0-9._-]{0,63}")
MAX_ABS_WEIGHT = 1e4


def check_domain(name: str) -> str:
    """Return `name` if it may name a domain.

    Raises:
        ValueError: If it does not match `[a-z0-9][a-z0-9._-]{0,63}`.
    """
    if not DOMAIN_PATTERN.fullmatch(name):
        raise ValueError(
            f"domain {name[:80]!r} is not a valid name: use 1 to 64 characters of a-z 0-9 . _ -, "
            "the first a letter or digit"
        )
    return name


def check_weight(domain: str, weight: float) -> float:
    """Return `weight` if it may weigh `domain`.

    Raises:
        ValueError: If it is not finite or its absolute value is above `MAX_ABS_WEIGHT`.
    """
    if not abs(weight) <= MAX_ABS_WEIGHT:  # so that NaN is refused too
        raise ValueError(
            f"weight of {domain} is {weight}: use a number between "
            f"-{MAX_ABS_WEIGHT:g} and {MAX_ABS_WEIGHT:g}"
        )
    return weight


@dataclass(frozen=True)
class Mix:
    """An immutable {domain: weight}; order-free, weight 0 = absent; the empty mix is the base.

    `entries` is sorted by domain, so equal mixes compare and hash equal.
    """

    entries: tuple[tuple[str, float], ...] = ()

    @classmethod
    def of(cls, weights: Mapping[str, float] | Iterable[tuple[str, float]]) -> Mix:
        """Build a mix from {domain: weight} or from pairs.

        Raises:
            ValueError: A bad domain name, a bad weight, or a domain named twice.
        """
        pairs = list(weights.items()) if isinstance(weights, Mapping) else list(weights)
        seen: set[str] = set()
        for domain, weight in pairs:
            check_domain(domain)
            check_weight(domain, weight)
            if domain in seen:
                raise ValueError(f"domain {domain} is named twice: name each domain once")
            seen.add(domain)
        return cls(tuple(sorted((d, float(w)) for d, w in pairs if w != 0)))

    def __len__(self) -> int:
        """Return the number of domains."""
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

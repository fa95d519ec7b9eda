"""Magnitude pruning: of each delta only the largest entries are summed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from superpose_adapters.merge.core_space import CoreSpace
from superpose_adapters.merge.density import check_density, keep_largest
from superpose_adapters.merge.method import Method
from superpose_adapters.merge.term import Pair, Term


@dataclass(frozen=True)
class CoreMagnitude(Method):
    """The sum of the core matrices, each with its `density` largest entries alone, not rescaled.

    What PEFT calls `magnitude_prune`, on other entries: on those of the core space, where a delta
    has few and they are all its own. Trimmed in each module apart.

    Which entries of a delta stay does not depend on its weight, save through the basis; a negative
    weight takes what stays away. Gauge changes nothing (see `CoreSpace`), nor does order. Where
    singular values of the bases coincide, those bases and with them the result are arbitrary. Rank:
    at most sum(r_i).

    Attributes:
        density: Share of entries kept, above 0 and at most 1; 1 is the plain sum.
    """

    name: ClassVar[str] = "core-magnitude"

    density: float = 0.5

    def __post_init__(self) -> None:
        """Check the density."""
        check_density(self.density)

    def merge(self, module: str, parts: int, terms: Sequence[Term]) -> Pair:
        """Trim and add."""
        space = CoreSpace.of(terms)
        return space.pair(keep_largest(space.cores, self.density).sum(dim=0))

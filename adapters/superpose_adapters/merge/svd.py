"""The plain sum at a lower rank: its best approximation, by singular values."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from superpose_adapters.merge.core_space import CoreSpace
from superpose_adapters.merge.method import Method
from superpose_adapters.merge.term import Pair, Term


@dataclass(frozen=True)
class TruncatedSvd(Method):
    """The `rank` strongest singular directions of sum_i w_i s_i B_i A_i.

    No pair of this rank is nearer to the sum (Eckart and Young). `deviation` states what is lost,
    which is the root of the sum of the squares of the other singular values. What PEFT calls `svd`,
    from the factors. A negative weight takes a delta away. Gauge and order change nothing.

    Attributes:
        rank: The rank in every module, less where the sum has less; 0 for the largest rank that the
            adapters have in that module, which is PEFT's default.
    """

    name: ClassVar[str] = "svd"

    rank: int = 0

    def __post_init__(self) -> None:
        """Check the rank."""
        if self.rank < 0:
            raise ValueError(f"rank is {self.rank}: use a rank, or 0 for the adapters' largest")

    def merge(self, module: str, parts: int, terms: Sequence[Term]) -> Pair:
        """Decompose and truncate."""
        space = CoreSpace.of(terms)
        rank = self.rank or max(term.rank for term in terms)
        a, b = space.pair(space.cores.sum(dim=0))
        return a[:rank], b[:, :rank]

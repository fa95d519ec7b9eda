"""TIES: trim each delta, elect a sign for every entry, and join those that have it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from superpose_adapters.merge.core_space import CoreSpace
from superpose_adapters.merge.density import check_density, keep_largest
from superpose_adapters.merge.low_rank_svd import NEGLIGIBLE
from superpose_adapters.merge.method import Method
from superpose_adapters.merge.term import Pair, Term

_JOINS = ("mean", "sum")


@dataclass(frozen=True)
class Ties(Method):
    """TIES, "Resolving Interference When Merging Models" (arXiv 2306.01708), on matrices (n, p, q).

    1. Trim: of each matrix the `density` largest entries stay, the others are 0.
    2. Elect: an entry's sign is that of its sum over the trimmed matrices. Where they cancel, no
       sign is elected and nothing is left.
    3. Join: the mean, or the sum, of those which have that sign; zeros do not count in the mean.

    Which matrices, subclasses tell. They trim in each module apart; the paper trims all of a model
    at once.

    Attributes:
        density: Share of entries kept, above 0 and at most 1; the paper's 0.2.
        join: `mean`, the paper's, or `sum`.
    """

    density: float = 0.2
    join: str = "mean"

    def __post_init__(self) -> None:
        """Check the options."""
        check_density(self.density)
        if self.join not in _JOINS:
            raise ValueError(f"join is {self.join[:80]!r}: use {' or '.join(_JOINS)}")

    def resolve(self, matrices: Tensor) -> Tensor:
        """Return one matrix (p, q) of several (n, p, q)."""
        trimmed = keep_largest(matrices, self.density)
        total = trimmed.sum(dim=0)
        cancels = total.abs() <= NEGLIGIBLE * trimmed.abs().sum(dim=0)
        elected = total.sign().masked_fill(cancels, 0)
        having = (trimmed.sign() == elected) & (trimmed != 0)
        joined = torch.where(having, trimmed, 0).sum(dim=0)
        return joined / having.sum(dim=0).clamp(min=1) if self.join == "mean" else joined


@dataclass(frozen=True)
class CoreTies(Ties):
    """TIES on the entries of the core matrices.

    Not TIES of the deltas, which would be of full rank: entries are of another basis. Of
    trained adapters either result is nearer to the plain sum than to the other (docs/merging.md).

    Weights multiply deltas before they are trimmed and counted: larger ones win elections, and a
    negative one votes for the opposite. Gauge changes nothing (see `CoreSpace`), nor does order.
    Where singular values of the bases coincide, those bases and with them the result are arbitrary.
    Rank: at most sum(r_i).
    """

    name: ClassVar[str] = "core-ties"

    def merge(self, module: str, parts: int, terms: Sequence[Term]) -> Pair:
        """Resolve the cores."""
        space = CoreSpace.of(terms)
        return space.pair(self.resolve(space.cores))

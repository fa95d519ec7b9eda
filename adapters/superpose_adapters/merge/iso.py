"""Iso-C: the sum with all its singular values made equal."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from superpose_adapters.merge.core_space import CoreSpace
from superpose_adapters.merge.method import Method
from superpose_adapters.merge.term import Pair, Term


@dataclass(frozen=True)
class CoreIso(Method):
    """mean(S) U V of the plain sum U diag(S) V = sum_i w_i s_i B_i A_i.

    Iso-C, "No Task Left Behind" (arXiv 2502.04959), over the singular values that the sum has in
    core space: on whole matrices the mean would be over hundreds of null ones, and equally strong
    directions of rounding would come in. Those which are rounding in core space too, where deltas
    cancel, stay out and do not count.

    Weights act on the sum; a negative one takes a delta away. Even a single adapter is changed.
    Gauge and order change nothing. Rank: that of the sum.
    """

    name: ClassVar[str] = "core-iso"

    def merge(self, module: str, parts: int, terms: Sequence[Term]) -> Pair:
        """Decompose the sum, and level it."""
        space = CoreSpace.of(terms)
        u, s, vh = space.svd(space.cores.sum(dim=0))
        return space.pair(u * s.mean() @ vh)

"""The mean of the deltas: the plain sum over the number of adapters."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from superpose_adapters.merge.method import Method
from superpose_adapters.merge.plain_sum import PlainSum
from superpose_adapters.merge.term import Pair, Term


@dataclass(frozen=True)
class Mean(Method):
    """(1/T) sum_i w_i s_i B_i A_i, T the number of adapters merged.

    Model Soups (arXiv 2203.05482), of deltas. T counts adapters that leave a module alone, which
    are zero there; it does not depend on the weights, so weights of sum 1 belong in a plain sum.
    A negative weight takes a delta away. Gauge and order change nothing. Rank: sum(r_i).
    """

    name: ClassVar[str] = "mean"

    def merge(self, module: str, parts: int, terms: Sequence[Term]) -> Pair:
        """Concatenate and divide."""
        a, b = PlainSum().merge(module, parts, terms)
        return a, b / parts

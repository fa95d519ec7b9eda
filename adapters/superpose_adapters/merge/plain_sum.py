"""The plain sum, which a mix is too: concatenated factors, of rank sum(r_i)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch

from superpose_adapters.merge.method import Method
from superpose_adapters.merge.term import Pair, Term


@dataclass(frozen=True)
class PlainSum(Method):
    """sum_i w_i s_i B_i A_i, exactly: factors are concatenated, never added.

    Task arithmetic (arXiv 2212.04089). The same factors, to the bit, as a fold of these adapters
    under these weights has. A negative weight takes a delta away. Gauge and order change nothing.
    Rank: sum(r_i).
    """

    name: ClassVar[str] = "sum"

    def merge(self, module: str, parts: int, terms: Sequence[Term]) -> Pair:
        """Concatenate."""
        return torch.cat([term.a for term in terms]), torch.cat([term.b for term in terms], dim=1)

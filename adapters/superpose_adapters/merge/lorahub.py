"""LoRAHub: A's summed with A's and B's with B's, by weights that are searched for on a few rows.

C. Huang et al., "LoraHub: Efficient Cross-Task Generalization via Dynamic LoRA Composition" (arXiv
2307.13269).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import torch

from superpose_adapters.merge.method import LEARNED, MergeError, Method
from superpose_adapters.merge.term import Pair, Term

BOUND = 1.5
"""Weights lie within plus and minus this."""


@dataclass(frozen=True)
class LoraHub(Method):
    """(sum_i v_i B_i) (sum_j v_j A_j): **no sum of deltas**, as v_i v_j B_i A_j is in it, too.

    This is what the paper does, and why it is no mix: half of an adapter is a quarter of its delta,
    and a lone adapter at -1 is the adapter. Weights v that lose least on rows, with `penalty` times
    the mean of |v|, are searched for without gradients. The authors use NGOpt; the search here is
    that of `adapterctl fit`, which finds weights of exact sums.

    Weights: of the parts multiply B_i, as their scalings do, before v multiplies both. Gauge: **not
    invariant**: (c A, B / c) and (-A, -B) are the same adapter and give other cross terms. Order:
    invariant. Rank: r, which all adapters must share in a module.

    Attributes:
        evaluations: Weights that are tried, at most.
        penalty: Nats a token.
        seed: Of the search.
        weights: Learned: v, of each part in the order of the fold.
    """

    name: ClassVar[str] = "lorahub"

    evaluations: int = 60
    penalty: float = 0.05
    seed: int = 0
    weights: tuple[float, ...] | None = field(default=None, repr=False, metadata=LEARNED)

    def __post_init__(self) -> None:
        """Refuse what cannot be meant.

        Raises:
            ValueError: An option is out of range.
        """
        if not 1 <= self.evaluations <= 10_000:
            raise ValueError(f"evaluations is {self.evaluations}: use 1 to 10000")
        if not 0 <= self.penalty <= 100:
            raise ValueError(f"penalty is {self.penalty:g}: use 0 to 100")
        if not 0 <= self.seed < 2**32:
            raise ValueError(f"seed is {self.seed}: use 0 to 2**32 - 1")

    def merge(self, module: str, parts: int, terms: Sequence[Term]) -> Pair:
        """Sum the A's and the B's.

        Raises:
            MergeError: The adapters' ranks differ in this module.
        """
        assert self.weights is not None
        assert len(self.weights) == parts
        ranks = sorted({term.rank for term in terms})
        if len(ranks) > 1:
            raise MergeError(
                f"lorahub adds A's to A's, and {module} has ranks {', '.join(map(str, ranks))}: "
                "merge adapters of one rank"
            )
        weights = [self.weights[term.part] for term in terms]
        a = torch.stack([v * term.a for v, term in zip(weights, terms, strict=True)]).sum(0)
        b = torch.stack([v * term.b for v, term in zip(weights, terms, strict=True)]).sum(0)
        return a, b

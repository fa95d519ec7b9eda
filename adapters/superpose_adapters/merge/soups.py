"""LoRA Soups' CAT: the sum with a learned weight for each module and adapter.

A. Prabhakar et al., "LoRA Soups: Merging LoRAs for Practical Skill Composition Tasks" (arXiv
2410.13025).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import torch

from superpose_adapters.merge.method import LEARNED, Method
from superpose_adapters.merge.term import Pair, Term

ModuleWeights = Mapping[str, Sequence[float]]
"""{module: the weight of each part, in the order of the fold}; of those with no term there, 0."""


@dataclass(frozen=True)
class Soups(Method):
    """sum_i c_i D_i with a weight c_i for each module, learned by gradient on rows of all tasks.

    With `softmax`, as in the authors' code, the weights of a module are a softmax of what is
    learned: above 0, and 1 together, so that the plain sum is out of reach. Without, they are what
    is learned, any number. A softmax is over the adapters that adapt the module.

    Both begin at 1 / n, the mean; the authors draw at random. They take one epoch of 10,000 rows in
    batches of 10 with AdamW at a rate of 1e-4; the defaults here are for a hundred rows.

    Weights: multiply the deltas, and what is learned multiplies that. Gauge: invariant. Order: of
    the parts, invariant. Rank: sum(r_i).

    Attributes:
        softmax: Whether the weights of a module are convex.
        steps: Of AdamW, without decay.
        batch_size: Rows a step.
        learning_rate: The same in all steps.
        seed: Of the order of the rows.
        weights: Learned.
    """

    name: ClassVar[str] = "soups"

    softmax: bool = True
    steps: int = 100
    batch_size: int = 10
    learning_rate: float = 0.02
    seed: int = 0
    weights: ModuleWeights | None = field(default=None, repr=False, metadata=LEARNED)

    def __post_init__(self) -> None:
        """Refuse what cannot be meant.

        Raises:
            ValueError: An option is out of range.
        """
        if not 0 <= self.steps <= 1_000_000:
            raise ValueError(f"steps is {self.steps}: use 0 to 1000000")
        if not 1 <= self.batch_size <= 10_000:
            raise ValueError(f"batch_size is {self.batch_size}: use 1 to 10000")
        if not 0 < self.learning_rate <= 1:
            raise ValueError(
                f"learning_rate is {self.learning_rate:g}: use a number above 0, at most 1"
            )
        if not 0 <= self.seed < 2**32:
            raise ValueError(f"seed is {self.seed}: use 0 to 2**32 - 1")

    def merge(self, module: str, parts: int, terms: Sequence[Term]) -> Pair:
        """Concatenate, each b times its weight."""
        assert self.weights is not None
        weights = self.weights[module]
        assert len(weights) == parts
        return (
            torch.cat([term.a for term in terms]),
            torch.cat([term.b * weights[term.part] for term in terms], dim=1),
        )

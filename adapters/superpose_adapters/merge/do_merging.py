"""DO-Merging: deltas made orthogonal, then their directions summed and their magnitudes averaged.

S. Zheng et al., "Decouple and Orthogonalize: A Data-Free Framework for LoRA Merging" (arXiv
2505.15875). The authors' code is not public, and what size and number of steps they take, what
weighs their penalty, and how they join magnitudes, is not known here: **a reconstruction**.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from superpose_adapters.merge.low_rank_svd import NEGLIGIBLE, balanced, low_rank_svd
from superpose_adapters.merge.method import Method
from superpose_adapters.merge.term import Pair, Term


@dataclass(frozen=True)
class DoMerging(Method):
    """sum_i D_i diag(m): D_i has the columns of the i-th delta at length 1, m their mean lengths.

    Before that, the factors are moved so that they overlap less, the A's by

        min over d  sum_{i != j} |A'_i A'_j^T|^2 + stay * sum_i |d_i|^2,   A'_i = A_i + d_i

    and the B's likewise, by gradient descent. The factors are balanced first (equal singular values
    on both sides) and divided by the largest singular value of all of them together, so that the
    options are free of units. The descent never leaves the span of the rows, and runs in
    coordinates there: a step costs O(R^3) with R = sum(r_i), whatever the module's width.

    The mean length is over the adapters with a delta in the module. With `steps` at 0, deltas whose
    columns are equally long give the plain sum.

    Weights: magnitudes are weighted, directions are not, as that is what taking them apart means.
    So two adapters at 1 and 0.1 point alike, at their mean length; a negative weight turns its
    directions round. Gauge and order change nothing. Rank: at most sum(r_i).

    Attributes:
        stay: What holds the factors where they are, above 0.
        steps: Of the descent; 0 leaves the factors as they are.
        step_size: Of the descent; above 0.2 it might diverge.
    """

    name: ClassVar[str] = "do"

    stay: float = 0.1
    steps: int = 100
    step_size: float = 0.1

    def __post_init__(self) -> None:
        """Refuse what cannot be meant.

        Raises:
            ValueError: An option is out of range.
        """
        if not 0 < self.stay <= 1:
            raise ValueError(f"stay is {self.stay:g}: use a number above 0, at most 1")
        if not 0 <= self.steps <= 10_000:
            raise ValueError(f"steps is {self.steps}: use 0 to 10000")
        if not 0 < self.step_size <= 0.2:
            raise ValueError(f"step_size is {self.step_size:g}: use a number above 0, at most 0.2")

    def merge(self, module: str, parts: int, terms: Sequence[Term]) -> Pair:
        """Move the factors apart, then give all columns their mean lengths."""
        deltas = [balanced(*low_rank_svd(term.a, term.b)) for term in terms]
        deltas = [(a, b) for a, b in deltas if len(a)]
        if not deltas:
            return terms[0].a[:0], terms[0].b[:, :0]
        a = self._apart([a for a, _ in deltas])
        b = [rows.T for rows in self._apart([b.T for _, b in deltas])]
        lengths = torch.stack([_column_lengths(*pair) for pair in zip(a, b, strict=True)])
        # A column that is 0 has no direction, and gets none.
        pointing = lengths > NEGLIGIBLE * lengths.max()
        factors = torch.where(pointing, lengths.mean(0) / lengths, 0.0)
        scaled = [rows * factor for rows, factor in zip(a, factors, strict=True)]
        return torch.cat(scaled), torch.cat(b, dim=1)

    def _apart(self, factors: Sequence[Tensor]) -> list[Tensor]:
        """Return the factors (r_i, n), moved so that rows of different ones overlap less."""
        ranks = [len(rows) for rows in factors]
        basis, triangle = torch.linalg.qr(torch.cat(list(factors)).T)
        size = torch.linalg.matrix_norm(triangle, 2)
        start = triangle.T / size  # (R, at most R): the rows, in coordinates of their span.
        owner = torch.repeat_interleave(torch.tensor(ranks))
        strangers = owner[:, None] != owner
        moved = start
        for _ in range(self.steps):
            overlaps = (moved @ moved.T) * strangers
            slope = 4 * overlaps @ moved + 2 * self.stay * (moved - start)
            moved = moved - self.step_size * slope
        return list(torch.split(moved @ basis.T * size, ranks))


def _column_lengths(a: Tensor, b: Tensor) -> Tensor:
    """Return the lengths of the columns of b @ a, (in,)."""
    lengths: Tensor = torch.linalg.vector_norm(torch.linalg.qr(b).R @ a, dim=0)
    return lengths

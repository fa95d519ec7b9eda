"""RegMean: the delta whose outputs are closest to each adapter's own, on that adapter's inputs.

X. Jin et al., "Dataless Knowledge Fusion by Merging Weights of Language Models" (arXiv 2212.09849).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from superpose_adapters.merge.method import LEARNED, MergeError, Method
from superpose_adapters.merge.term import Pair, Term

Moments = Mapping[str, Sequence[Tensor]]
"""{module: E[x x^T] of its inputs, float32 (in, in), for each part in the order of the fold}."""

# Of the moments' least eigenvalue, inputs being scaled to 1: by its inverse the rounding of
# moments, which are float32, enters the result.
_SMALLEST = 1e-4
_ITERATIONS = 10


@dataclass(frozen=True)
class RegMean(Method):
    """sum_i D_i G_i (sum_j G_j)^-1, where G_i are the moments E[x x^T] of the i-th part's inputs.

    It minimises sum_i E|W x - W_i x|^2. As D_i = B_i A_i, that is b = B_i beside each other and
    a = A_i G_i (sum G)^-1 above each other: rank sum(r_i), and one solve of (in, in), in float64,
    by Cholesky's decomposition: the one place where a merge is not linear in a module's width (0.3
    s at 768 inputs, 2 s at 3072, on 2 busy cores).

    Numbers off the diagonal of each G_i are multiplied by `off_diagonal`, as the paper does: at 1
    the solve is ill-conditioned where inputs hardly differ, and refused where the rounding of
    moments would decide it. An input that is 0 in all rows gets nothing.

    The sum of moments is over all parts, those too that leave the module alone: they want what the
    base does with their inputs. With equal moments the result is the mean, with one part that part.

    Weights: multiply the deltas; it is linear in them, negative ones included. Gauge: invariant.
    Order: invariant.

    Attributes:
        off_diagonal: 0 to 1.
        moments: Learned: of every module that is merged.
    """

    name: ClassVar[str] = "regmean"

    off_diagonal: float = 0.6
    moments: Moments | None = field(default=None, repr=False, metadata=LEARNED)

    def __post_init__(self) -> None:
        """Refuse what cannot be meant.

        Raises:
            ValueError: An option is out of range.
        """
        if not 0 <= self.off_diagonal <= 1:
            raise ValueError(f"off_diagonal is {self.off_diagonal:g}: use 0 to 1")

    def merge(self, module: str, parts: int, terms: Sequence[Term]) -> Pair:
        """Solve.

        Raises:
            MergeError: The inputs that were seen do not determine the result.
        """
        assert self.moments is not None
        assert len(self.moments[module]) == parts
        moments = [self._shrunk(moment) for moment in self.moments[module]]
        wanted = torch.cat([term.a @ moments[term.part] for term in terms])
        a = _solved(module, torch.stack(moments).sum(0), wanted)
        return a, torch.cat([term.b for term in terms], dim=1)

    def _shrunk(self, moment: Tensor) -> Tensor:
        shrunk = moment.double() * self.off_diagonal
        shrunk.diagonal().copy_(moment.diagonal())
        return shrunk


def _solved(module: str, total: Tensor, wanted: Tensor) -> Tensor:
    """Return x with x @ total = wanted; total is symmetric.

    Raises:
        MergeError: It is singular, or nearly.
    """
    energies = total.diagonal()
    lengths = torch.where(energies > 0, energies, 1.0).sqrt()
    unit = total / lengths / lengths[:, None]
    unit.diagonal().fill_(1.0)
    factor, failed = torch.linalg.cholesky_ex(unit)
    if failed or _least_eigenvalue(factor) < _SMALLEST:
        raise MergeError(
            f"regmean: the rows do not tell the {len(total)} inputs of {module} apart: "
            "give more of them, or a lower off_diagonal"
        )
    return torch.cholesky_solve((wanted / lengths).T, factor).T / lengths


def _least_eigenvalue(factor: Tensor) -> float:
    """Return about the least eigenvalue of a matrix by its Cholesky factor, by inverse iteration.

    Too large rather than too small, by little: each iteration is a solve in O(n^2).
    """
    generator = torch.Generator().manual_seed(0)
    vector = torch.randn(len(factor), 1, generator=generator, dtype=factor.dtype)
    for _ in range(_ITERATIONS):
        vector = torch.cholesky_solve(vector / vector.norm(), factor)
    return 1 / float(vector.norm())

"""LoRA-LEGO: the ranks of all adapters as one pool, clustered into as many as are wanted.

Z. Zhao et al., "Merging LoRAs like Playing LEGO: Pushing the Modularity of LoRA to Extremes
Through Rank-Wise Clustering" (arXiv 2409.16167). The authors' code is not public: **a
reconstruction**.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from superpose_adapters.merge.low_rank_svd import NEGLIGIBLE, balanced, low_rank_svd
from superpose_adapters.merge.method import Method
from superpose_adapters.merge.term import Pair, Term


@dataclass(frozen=True)
class Lego(Method):
    """sum_c b_c a_c over k clusters of units; a unit is one rank of one adapter, (a_j, b_j).

    (a_c, b_c) is the mean of a cluster's units. It counts once, however many they are: units that
    agree are averaged, those that do not are summed. Clusters are k-means' (k-means++, then Lloyd's
    iterations) in the in + out numbers of a unit. Where k is the number of units or more, there is
    nothing to cluster, and without `reweight` the result is the plain sum.

    The paper clusters the rows of A and the columns of B as they were trained. What comes of that
    depends on their gauge: (c a, b / c) and (-a, -b) are the same delta, but lie elsewhere. Here
    units come from the singular value decomposition, a root of the value on either side, the
    number of a that is largest in size being positive. So gauge changes nothing, except where
    singular values are equal.

    With `reweight`, after the paper: the mean of a cluster, which is shorter than its units, gets
    their mean length; and all is multiplied by sqrt(r / k), r being the parts' largest rank in the
    module, since a sum of fewer ranks varies less.

    Weights: their roots scale both halves of a unit. A negative one turns b round, so its units
    are clusters of their own, or shorten those that they fall into. Order changes nothing. Rank: at
    most k.

    Attributes:
        rank: k; 0 for the parts' largest rank in the module.
        iterations: Of k-means.
        seed: Of its first centres.
        reweight: Whether lengths are made up for.
    """

    name: ClassVar[str] = "lego"

    rank: int = 0
    iterations: int = 10
    seed: int = 0
    reweight: bool = True

    def __post_init__(self) -> None:
        """Refuse what cannot be meant.

        Raises:
            ValueError: An option is out of range.
        """
        if self.rank < 0:
            raise ValueError(f"rank is {self.rank}: use a rank, or 0 for the adapters' largest")
        if not 1 <= self.iterations <= 1000:
            raise ValueError(f"iterations is {self.iterations}: use 1 to 1000")
        if not 0 <= self.seed < 2**32:
            raise ValueError(f"seed is {self.seed}: use 0 to 2**32 - 1")

    def merge(self, module: str, parts: int, terms: Sequence[Term]) -> Pair:
        """Cluster the units of all terms."""
        largest = max(term.rank for term in terms)
        inputs = terms[0].a.shape[1]
        means = self._clustered(torch.cat([_units(term) for term in terms]), self.rank or largest)
        a, b = means[:, :inputs], means[:, inputs:].T
        return a, b * math.sqrt(largest / max(1, len(a))) if self.reweight else b

    def _clustered(self, units: Tensor, count: int) -> Tensor:
        """Return at most `count` means of units (n, in + out); fewer where units coincide."""
        if count >= len(units):
            return units
        # In coordinates of their span distances are the same, and n numbers long at most.
        basis, triangle = torch.linalg.qr(units.T)
        points = triangle.T
        centres = self._first_centres(points, count)
        for _ in range(self.iterations):
            nearest = _distances(points, centres).argmin(1)
            # A centre that has lost all of its units is the mean of none, and goes.
            clusters = [points[nearest == c] for c in sorted(set(nearest.tolist()))]
            centres = torch.stack([members.mean(0) for members in clusters])
        if self.reweight:
            centres = torch.stack([_mean_at_length(members) for members in clusters])
        means: Tensor = centres @ basis.T
        return means

    def _first_centres(self, points: Tensor, count: int) -> Tensor:
        """Draw points, each with a chance that grows as its squared distance to those drawn."""
        random = torch.Generator().manual_seed(self.seed)
        rounding = NEGLIGIBLE * points.norm(dim=1).max()
        drawn = [int(torch.randint(len(points), (1,), generator=random))]
        while len(drawn) < count:
            away = _distances(points, points[drawn]).amin(1)
            # Units of one delta in other factors are a rounding apart, and the same.
            if away.max() <= rounding:
                break
            chances = away.masked_fill(away <= rounding, 0).square()
            drawn.append(int(torch.multinomial(chances, 1, generator=random)))
        return points[drawn]


def _units(term: Term) -> Tensor:
    """Return the units of a term, (rank, in + out): a beside b, each in the one gauge."""
    a, b = balanced(*low_rank_svd(term.a, term.b))
    largest = a.gather(1, a.abs().argmax(1, keepdim=True))
    return torch.cat([a, b.T], dim=1) * largest.sign()


def _distances(points: Tensor, centres: Tensor) -> Tensor:
    # Not through products, whose differences keep half of the digits.
    return torch.cdist(points, centres, compute_mode="donot_use_mm_for_euclid_dist")


def _mean_at_length(members: Tensor) -> Tensor:
    """Return the mean of points, as long as they are on average; 0 if they cancel."""
    mean = members.mean(0)
    length, average = mean.norm(), members.norm(dim=1).mean()
    return mean * (average / length) if length > NEGLIGIBLE * average else torch.zeros_like(mean)

"""TSV-M: singular vectors of the deltas, made orthogonal to each other before they are added."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from superpose_adapters.merge.core_space import CoreSpace
from superpose_adapters.merge.low_rank_svd import svd
from superpose_adapters.merge.method import Method
from superpose_adapters.merge.term import Pair, Term


@dataclass(frozen=True)
class CoreTsv(Method):
    """polar([U_1 ... U_T]) diag(S_1 ... S_T) polar([V_1; ...; V_T]), U_i S_i V_i = w_i s_i B_i A_i.

    TSV-M, "Task Singular Vectors" (arXiv 2412.00081), with all r_i singular vectors of each delta.
    The paper's k = min(in, out)/T vectors are mostly null ones for a LoRA, whose directions are
    rounding. With k = r it is the same in core space as outside.

    polar(X) is the nearest matrix with orthonormal columns (rows). Where singular vectors of
    several deltas are dependent there is no such matrix, and the partial isometry X (X^T X)^(-1/2)
    is taken over what X spans: several equal deltas give that delta once, with the mean of their
    weights. Vectors that are nearly dependent are far moved, and what is merged of them is mostly
    what little they differ in: so of an adapter and its copy rounded to another dtype.

    A weight multiplies its delta's singular values; a negative one turns the delta round. Gauge and
    order change nothing. Rank: at most sum(r_i).
    """

    name: ClassVar[str] = "core-tsv"

    def merge(self, module: str, parts: int, terms: Sequence[Term]) -> Pair:
        """Decompose every core, and put their singular vectors apart."""
        space = CoreSpace.of(terms)
        u, s, vh = zip(*map(space.svd, space.cores), strict=True)
        return space.pair(_polar(torch.cat(u, dim=1)) * torch.cat(s) @ _polar(torch.cat(vh)))


def _polar(matrix: Tensor) -> Tensor:
    """Return the orthogonal polar factor of a matrix, over what it spans."""
    u, _, vh = svd(matrix)
    return u @ vh

"""The core space of one module: its deltas as small matrices, with nothing lost.

After "Accurate and Efficient Low-Rank Model Merging in Core Space" (arXiv 2509.17786): with an
orthonormal basis of what all B's span and one of what all A's span, a delta is left @ core @ right,
and its core has only as many rows and columns as the adapters have ranks together.

Where the paper takes the bases from the factors as they are, here each delta is first split evenly,
into u sqrt(s) and sqrt(s) vh. Else the bases, and with them all that looks at single entries of a
core, would depend on how each adapter happens to divide its delta between A and B: (cA, B/c) is the
same adapter. The bases are thus the eigenvectors of sum_i |D_i^T| and sum_i |D_i|, in descending
order, where |D| is the root of D^T D. Their signs are arbitrary and their effect is not: a sign
turns the same row or column of every core.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from superpose_adapters.merge.low_rank_svd import Svd, balanced, low_rank_svd, principal_basis, svd
from superpose_adapters.merge.term import Pair, Term


@dataclass(frozen=True)
class CoreSpace:
    """The bases of one module's terms, and the terms in them; all float64.

    Attributes:
        left: (out, p), orthonormal columns.
        right: (q, in), orthonormal rows.
        cores: (terms, p, q), where left @ cores[i] @ right is term i. p and q are at most the sum
            of the ranks, less where deltas share directions, 0 if all of them are zero.
    """

    left: Tensor
    right: Tensor
    cores: Tensor

    @classmethod
    def of(cls, terms: Sequence[Term]) -> CoreSpace:
        """Find the core space of at least one term, in O((in + out) R^2) for R ranks together."""
        deltas = [low_rank_svd(term.a, term.b) for term in terms]
        halves = [balanced(*delta) for delta in deltas]
        left = principal_basis(torch.cat([b for _, b in halves], dim=1))
        right = principal_basis(torch.cat([a.T for a, _ in halves], dim=1)).T
        cores = [(left.T @ u) * s @ (vh @ right.T) for u, s, vh in deltas]
        return cls(left, right, torch.stack(cores))

    def svd(self, core: Tensor) -> Svd:
        """Decompose a core (p, q), leaving out what is rounding beside the terms.

        Beside the terms, and not beside the core itself: terms may cancel in it.
        """
        return svd(core, scale=float(self.cores.flatten(1).norm(dim=1).max()))

    def pair(self, core: Tensor) -> Pair:
        """Return the factors of left @ core @ right, strongest directions first.

        Args:
            core: (p, q).

        Returns:
            a (R, in) and b (out, R), R the rank of the core: 0 where nothing is left.
        """
        u, s, vh = self.svd(core)
        return balanced(self.left @ u, s, vh @ self.right)

"""KnOTS-TIES: TIES on the coefficients of the deltas in one common basis of their outputs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch

from superpose_adapters.merge.low_rank_svd import low_rank_svd, principal_basis
from superpose_adapters.merge.term import Pair, Term
from superpose_adapters.merge.ties import Ties


@dataclass(frozen=True)
class KnotsTies(Ties):
    """U TIES(P_1, ..., P_T), where [D_1 ... D_T] = U S [V_1 ... V_T] and P_i = S V_i.

    "Model merging with SVD to tie the KnOTS" (arXiv 2410.19735). D_i is w_i s_i B_i A_i, and P_i is
    U^T D_i, of at most sum(r_j) rows. U comes from the factors: with D_i = u_i s_i v_i, it is that
    of [u_1 s_1 ... u_T s_T].

    Weights multiply deltas before all else, so they turn U too, where the paper has one factor for
    the result; larger ones win elections, and a negative one votes for the opposite. Gauge and
    order change nothing. Where singular values of the basis coincide, it and with it the result are
    arbitrary. Rank: at most sum(r_i).
    """

    name: ClassVar[str] = "knots-ties"

    def merge(self, module: str, parts: int, terms: Sequence[Term]) -> Pair:
        """Resolve the coefficients."""
        deltas = [low_rank_svd(term.a, term.b) for term in terms]
        basis = principal_basis(torch.cat([u * s for u, s, _ in deltas], dim=1))  # (out, p)
        coefficients = torch.stack([(basis.T @ u) * s @ vh for u, s, vh in deltas])  # (T, p, in)
        merged = self.resolve(coefficients)
        kept = merged.any(dim=1)  # What is trimmed or cancels is 0 and not almost.
        return merged[kept], basis[:, kept]

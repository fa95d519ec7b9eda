"""The singular value decomposition of a delta, from its factors: the delta is never formed."""

from __future__ import annotations

import torch
from torch import Tensor

from superpose_adapters.merge.term import Pair

NEGLIGIBLE = 1e-12
"""The share of what is largest below which a number is rounding: float32 factors, whose products
are exact to 1e-16 here, mean nothing that is smaller."""

Svd = tuple[Tensor, Tensor, Tensor]
"""u (m, k), s (k,) descending, vh (k, n): u @ diag(s) @ vh, k possibly 0."""


def svd(matrix: Tensor, scale: float | None = None) -> Svd:
    """Decompose a small matrix (m, n), leaving out singular values that are rounding.

    Singular vectors of what is rounding point anywhere, and some methods would blow them up.

    Args:
        matrix: float64.
        scale: What singular values are negligible against; the largest of them unless given.
    """
    u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
    kept = s > NEGLIGIBLE * (float(s[:1].sum()) if scale is None else scale)
    return u[:, kept], s[kept], vh[kept]


def low_rank_svd(a: Tensor, b: Tensor) -> Svd:
    """Decompose b @ a in O((in + out) r^2), without singular values that are rounding.

    It depends on the product alone, up to the signs of singular vectors (both of a pair turn), and
    to rotations among those whose singular values are equal.

    Args:
        a: float64 (r, in).
        b: float64 (out, r).

    Returns:
        u (out, k), s (k,), vh (k, in) with k <= r.
    """
    left, b_small = torch.linalg.qr(b)
    right, a_small = torch.linalg.qr(a.T)
    u, s, vh = svd(b_small @ a_small.T)
    return left @ u, s, vh @ right.T


def principal_basis(columns: Tensor) -> Tensor:
    """Return the left singular vectors of a matrix (m, n) whose values are not rounding, (m, k).

    Of a tall matrix, as factors beside each other are: its triangle alone is decomposed.

    Args:
        columns: float64.
    """
    basis, triangle = torch.linalg.qr(columns)
    u, _, _ = svd(triangle)
    principal: Tensor = basis @ u
    return principal


def balanced(u: Tensor, s: Tensor, vh: Tensor) -> Pair:
    """Return the factors of u @ diag(s) @ vh that have a root of s each."""
    root = s.sqrt()
    return root[:, None] * vh, u * root

"""Density: the share of the entries of a matrix that a method keeps."""

from __future__ import annotations

import torch
from torch import Tensor

from superpose_adapters.merge.low_rank_svd import NEGLIGIBLE

_TIE = 1e-9  # Magnitudes closer than this are equal; rounding is not to choose between them.


def check_density(density: float) -> None:
    """Raise ValueError unless density is above 0 and at most 1."""
    if not 0 < density <= 1:
        raise ValueError(f"density is {density}: use above 0 and at most 1")


def keep_largest(matrices: Tensor, density: float) -> Tensor:
    """Return matrices (n, p, q) with all but the largest entries of each set to 0.

    Of each, round(density p q) entries are kept, at least one; more where the last of them ties
    with others. What is rounding beside a matrix's largest entry is 0 too, since methods ask which
    entries are.
    """
    sizes = matrices.abs().flatten(1)  # (n, p q)
    entries = sizes.shape[1]
    if not entries:
        return matrices
    kept = max(1, round(density * entries))
    last = sizes.kthvalue(entries - kept + 1, dim=1).values
    floor = torch.maximum(last * (1 - _TIE), sizes.amax(dim=1) * NEGLIGIBLE)
    return matrices * (sizes >= floor[:, None]).view_as(matrices)

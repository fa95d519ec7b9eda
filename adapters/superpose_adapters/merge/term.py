"""What is merged in one module: the weighted delta of each adapter that adapts it."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Term:
    """One adapter's weighted delta of one module, b @ a.

    Attributes:
        part: Which of the adapters it is of, from 0.
        a: float64, (r, in).
        b: float64, (out, r), the adapter's scaling and its weight multiplied in.
        scale: What these are together, for whoever would rather have them in a.
    """

    part: int
    a: Tensor
    b: Tensor
    scale: float = 1.0

    @property
    def rank(self) -> int:
        """The rank r."""
        return self.a.shape[0]


Pair = tuple[Tensor, Tensor]
"""Factors of a merged delta b @ a, float64: a (R, in) and b (out, R)."""

"""The plain sum in the very tensors that PEFT's `cat` makes of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch

from superpose_adapters.merge.method import Method
from superpose_adapters.merge.term import Pair, Term


@dataclass(frozen=True)
class Cat(Method):
    """sum_i B_i (w_i s_i A_i): the same delta as `sum`, the weights in A, and B as it is.

    PEFT's `add_weighted_adapter(combination_type="cat")`. Of rsLoRA adapters PEFT 0.21 makes a
    delta that is sqrt(sum(r_i)) times too large, since the new adapter inherits rsLoRA's scaling;
    here it is right. A negative weight takes a delta away. Gauge changes the tensors and not the
    delta, order neither. Rank: sum(r_i).
    """

    name: ClassVar[str] = "cat"

    def merge(self, module: str, parts: int, terms: Sequence[Term]) -> Pair:
        """Concatenate, with the scale on the side of A."""
        a = torch.cat([term.a * term.scale for term in terms])
        # A scale of 0, of an alpha of 0, has made 0 of B, which stays so.
        b = torch.cat([term.b / (term.scale or 1.0) for term in terms], dim=1)
        return a, b

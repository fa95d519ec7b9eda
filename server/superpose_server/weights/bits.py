"""Tensors compared bit by bit."""

from __future__ import annotations

import torch
from torch import Tensor

_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def same_bits(one: Tensor, other: Tensor) -> bool:
    """Return whether two tensors of one shape and dtype hold the same bits, wherever they lie.

    0.0 and -0.0 differ, and a NaN is equal to itself.
    """
    integers = _INTEGERS[one.element_size()]
    return torch.equal(one.detach().view(integers), other.to(one.device).view(integers))

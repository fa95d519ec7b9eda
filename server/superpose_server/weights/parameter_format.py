"""How a parameter lies in memory, and how a fold writes it there.

Plain is the checkpoint's layout, on any device; packed is that of the CPU kernels. Both turn the
concatenated factors of a mix into the form that they fold fastest, once, when a mix is prepared.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from superpose_adapters.fold import fold_into
from superpose_adapters.layout import ModuleLayout
from superpose_server.model.packed import PANEL

Pair = tuple[Tensor, Tensor]


class ParameterFormat(Protocol):
    """One module's parameter, its base, and folds into it."""

    def arrange(self, a_cat: Tensor, b_cat: Tensor) -> Pair:
        """Return A_cat float32 (R, in) and B_cat float32 (out, R) as `fold` wants them."""
        ...

    def fold(self, out: Tensor, base: Tensor, pair: Pair) -> None:
        """Write base + delta into `out`, in place: a function of base and pair alone."""
        ...

    def delta(self, pair: Pair) -> Tensor:
        """Return the delta, float64, in the parameter's shape."""
        ...


@dataclass(frozen=True)
class PlainFormat:
    """(in, out) for Conv1D, (out, in) for nn.Linear."""

    layout: ModuleLayout
    device: torch.device

    def arrange(self, a_cat: Tensor, b_cat: Tensor) -> Pair:
        """Move the factors to the device."""
        return a_cat.to(self.device), b_cat.to(self.device)

    def fold(self, out: Tensor, base: Tensor, pair: Pair) -> None:
        """See `fold_into`."""
        fold_into(out, base, *pair, self.layout)

    def delta(self, pair: Pair) -> Tensor:
        """Form B A."""
        return self.layout.delta(pair[1].double() @ pair[0].double())


class PackedFormat:
    """(panels, in, 16), written in one pass by the CPU kernel."""

    def arrange(self, a_cat: Tensor, b_cat: Tensor) -> Pair:
        """Return A^T (in, R) and B^T in panels (panels, R, 16), R filled up to a multiple of 4."""
        rank, inputs = a_cat.shape
        outputs = b_cat.shape[0]
        filled = -(-rank // 4) * 4
        panels = -(-outputs // PANEL)
        a = torch.zeros(inputs, filled)
        a[:, :rank] = a_cat.T
        b = torch.zeros(panels * PANEL, filled)
        b[:outputs, :rank] = b_cat
        return a, b.view(panels, PANEL, filled).transpose(1, 2).contiguous()

    def fold(self, out: Tensor, base: Tensor, pair: Pair) -> None:
        """See `fold` in kernels.cpp."""
        torch.ops.superpose.fold(out, base, *pair)

    def delta(self, pair: Pair) -> Tensor:
        """Form (A^T B^T) a panel."""
        return pair[0].double() @ pair[1].double()

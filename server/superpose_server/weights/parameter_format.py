"""How a parameter lies in memory, and how a fold writes it there.

Plain is the checkpoint's layout, on any device; packed is that of the CPU kernels. Both turn the
concatenated factors of a mix into the form that they fold fastest, once, when a mix is prepared.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from superpose_adapters.fold import fold_alike_into, fold_into
from superpose_adapters.layout import ModuleLayout
from superpose_server.model.packed import PANEL

Pair = tuple[Tensor, Tensor]

# Elements of parameters that one fold on a GPU writes together: 64 MiB of float32 scratch.
_TOGETHER = 1 << 24


class ParameterFormat(Protocol):
    """A module's parameter, its base, and folds into it."""

    def arrange(self, a_cat: Tensor, b_cat: Tensor) -> Pair:
        """Return A_cat float32 (R, in) and B_cat float32 (out, R) as `fold` wants them."""
        ...

    def kind(self, out: Tensor, pair: Pair) -> Hashable:
        """Return what parameters must have in common to be folded together; None: fold it alone."""
        ...

    def fold(self, outs: Sequence[Tensor], bases: Sequence[Tensor], pairs: Sequence[Pair]) -> None:
        """Write base + delta into each of `outs`, in place: a function of bases and pairs alone.

        Args:
            outs: Parameters of one kind.
            bases: Their base parameters.
            pairs: Their factors.
        """
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

    def kind(self, out: Tensor, pair: Pair) -> Hashable:
        """Alike on a GPU are shape, layout and rank, in a dtype that needs float32 scratch."""
        if out.device.type == "cpu" or out.dtype == torch.float32:
            return None
        return self.layout, pair[0].shape

    def fold(self, outs: Sequence[Tensor], bases: Sequence[Tensor], pairs: Sequence[Pair]) -> None:
        """See `fold_into` and `fold_alike_into`."""
        if len(outs) > 1:
            fold_alike_into(outs, bases, pairs, self.layout)
        else:
            fold_into(outs[0], bases[0], *pairs[0], self.layout)

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

    def kind(self, out: Tensor, pair: Pair) -> Hashable:
        """Return None: the kernel takes one, and is no slower for it."""
        return None

    def fold(self, outs: Sequence[Tensor], bases: Sequence[Tensor], pairs: Sequence[Pair]) -> None:
        """See `fold` in kernels.cpp."""
        for out, base, pair in zip(outs, bases, pairs, strict=True):
            torch.ops.superpose.fold(out, base, *pair)

    def delta(self, pair: Pair) -> Tensor:
        """Form (A^T B^T) a panel."""
        return pair[0].double() @ pair[1].double()


def fold_groups(
    formats: Mapping[str, ParameterFormat],
    live: Mapping[str, Tensor],
    factors: Mapping[str, Pair],
) -> Iterable[tuple[str, ...]]:
    """Return which modules are folded together, each of `factors` once: a function of the mix.

    That matters, since a product of other company may round differently in its last bit.
    """
    groups: dict[Hashable, list[str]] = {}
    for module, pair in factors.items():
        out = live[module]
        kind = formats[module].kind(out, pair)
        if kind is None:
            yield (module,)
            continue
        group = groups.setdefault(kind, [])
        if group and (len(group) + 1) * out.numel() > _TOGETHER:
            yield tuple(group)
            group.clear()
        group.append(module)
    yield from (tuple(group) for group in groups.values())

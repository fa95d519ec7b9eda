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
from superpose_server.model.packed import PANEL, packed_depth, unpack

Pair = tuple[Tensor, Tensor]

_INTEGERS = {torch.float32: torch.int32, torch.bfloat16: torch.int16}
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

    def plain(self, parameter: Tensor) -> Tensor:
        """Return a parameter as the checkpoint has it, which is the same on every processor.

        Whatever else lies in memory must be zero: a parameter where it is not is returned as it is.
        """
        ...

    def delta(self, pair: Pair) -> Tensor:
        """Return the delta, float64, as the checkpoint has the parameter."""
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

    def plain(self, parameter: Tensor) -> Tensor:
        """Return it as it is."""
        return parameter

    def delta(self, pair: Pair) -> Tensor:
        """Form B A."""
        return self.layout.delta(pair[1].double() @ pair[0].double())


@dataclass(frozen=True)
class PackedFormat:
    """In panels (`packed.py`), written in one pass by the CPU kernel."""

    layout: ModuleLayout
    dtype: torch.dtype

    def arrange(self, a_cat: Tensor, b_cat: Tensor) -> Pair:
        """Return A^T (in, R) and B^T in panels (panels, R, 16).

        R is filled up to a multiple of 4, and the features as those of a parameter.
        """
        rank, inputs = a_cat.shape
        outputs = b_cat.shape[0]
        filled = -(-rank // 4) * 4
        panels = -(-outputs // PANEL)
        a = torch.zeros(packed_depth(inputs, self.dtype), filled)
        a[:inputs, :rank] = a_cat.T
        b = torch.zeros(panels * PANEL, filled)
        b[:outputs, :rank] = b_cat
        return a, b.view(panels, PANEL, filled).transpose(1, 2).contiguous()

    def kind(self, out: Tensor, pair: Pair) -> Hashable:
        """Return None: the kernel takes one, and is no slower for it."""
        return None

    def fold(self, outs: Sequence[Tensor], bases: Sequence[Tensor], pairs: Sequence[Pair]) -> None:
        """See `fold` in kernels/fold.h."""
        for out, base, pair in zip(outs, bases, pairs, strict=True):
            torch.ops.superpose.fold(out, base, *pair)

    def plain(self, parameter: Tensor) -> Tensor:
        """Take it out of its panels, if what fills them up is zero, every bit of it."""
        matrix = unpack(parameter, self.layout.in_features, self.layout.out_features)
        integers = _INTEGERS[parameter.dtype]
        counts = [numbers.view(integers).count_nonzero() for numbers in (matrix, parameter)]
        if counts[0] != counts[1]:
            return parameter
        return matrix if self.layout.transposed else matrix.T

    def delta(self, pair: Pair) -> Tensor:
        """Form B A."""
        a = pair[0][: self.layout.in_features].double()
        b = pair[1].transpose(1, 2).flatten(0, 1)[: self.layout.out_features].double()
        return self.layout.delta(b @ a.T)


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

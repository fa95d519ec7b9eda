"""Factors as the CPU kernels read them: in the dtype of the parameters, B in panels as they are."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from superpose_adapters.adapter import Adapter, Factors
from superpose_server.model.packed import PANEL
from superpose_server.weights.bits import same_bits


@dataclass(frozen=True)
class Pair:
    """The factors of a module.

    Attributes:
        a: (ranks, in), ranks filled up with zeros to what fills 4 bytes.
        b: (panels, ranks / side, 16, side), as a parameter lies: a few panels of all ranks are side
            by side, where rows as long as the module is wide would share the same cache lines.
        out_features: Output features; the last panel is filled up with zeros.
    """

    a: Tensor
    b: Tensor
    out_features: int


class KernelFactors:
    """The factors of adapters, rearranged once for each and freed with it.

    A step with many domains in its batch reads all their factors. In bfloat16 they are rounded by
    as much, relatively, as the outputs that their terms are added to; sums are float32.
    """

    def __init__(self, dtype: torch.dtype) -> None:
        """Keep factors in `dtype`, that of the parameters."""
        self._dtype = dtype
        self._pairs: WeakKeyDictionary[Adapter, dict[str, Pair]] = WeakKeyDictionary()

    def of(self, adapters: Sequence[Adapter], module: str) -> list[Pair]:
        """Return the factors of a module that all of `adapters` adapt.

        Raises:
            ValueError: They are not of one size.
        """
        for adapter in adapters:
            if adapter not in self._pairs:
                modules = adapter.modules.items()
                self._pairs[adapter] = {name: self._arrange(name, f) for name, f in modules}
        pairs = [self._pairs[adapter][module] for adapter in adapters]
        sizes = {(pair.a.shape[1], pair.out_features) for pair in pairs}
        if len(sizes) > 1:
            raise ValueError(f"factors of {module} are for modules of different sizes: {sizes}")
        return pairs

    def compare(self, adapter: Adapter) -> Iterator[tuple[bool, int]]:
        """Yield, for each module of an adapter that is kept, whether it is whole, and its bytes."""
        for name, kept in self._pairs.get(adapter, {}).items():
            fresh = self._arrange(name, adapter.modules[name])
            whole = same_bits(kept.a, fresh.a) and same_bits(kept.b, fresh.b)
            yield whole, kept.a.nbytes + kept.b.nbytes

    def _arrange(self, module: str, factors: Factors) -> Pair:
        (ranks, inputs), (outputs, of_b) = factors.a.shape, factors.b.shape
        if ranks != of_b:
            raise ValueError(f"factors of {module} have ranks {ranks} and {of_b}")
        side = 4 // self._dtype.itemsize
        panels, filled = -(-outputs // PANEL), -(-ranks // side) * side
        a = torch.zeros(filled, inputs, dtype=self._dtype)
        a[:ranks] = factors.a
        b = torch.zeros(panels * PANEL, filled, dtype=self._dtype)
        b[:outputs, :ranks] = factors.b
        in_panels = b.view(panels, PANEL, filled // side, side).transpose(1, 2).contiguous()
        return Pair(a, in_panels, outputs)

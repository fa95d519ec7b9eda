"""Corrections of packed modules: the CPU kernels read factors where the adapters keep them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from typing import cast

import torch
from torch import Tensor, nn

from superpose_adapters.adapter import Adapter, Factors
from superpose_server.model.packed import PackedLinear


class KernelCorrection:
    """One term a module; nothing is gathered or copied, and a gate of 0 costs nothing."""

    def __init__(
        self, adapters: Sequence[Adapter], gates: Tensor, heads: frozenset[str] = frozenset()
    ) -> None:
        """Take the gates of each row.

        Args:
            adapters: Those that any row needs, in the order of summation.
            gates: float64 (rows, adapters).
            heads: Modules that see only the tokens whose logits are wanted.
        """
        self._heads = heads
        self._terms: dict[str, KernelTerm] = {}
        for name in dict.fromkeys(name for adapter in adapters for name in adapter.modules):
            columns = [i for i, adapter in enumerate(adapters) if name in adapter.modules]
            factors = [adapters[i].modules[name] for i in columns]
            scaling = torch.tensor([f.scaling for f in factors], dtype=torch.float64)
            self._terms[name] = KernelTerm(factors, (gates[:, columns] * scaling).float())

    def attach(
        self, modules: Mapping[str, nn.Module], tokens: Tensor, logits: Tensor, until: ExitStack
    ) -> None:
        """See `Correction`."""
        for name, term in self._terms.items():
            module = cast(PackedLinear, modules[name])
            term.attach(module, logits if name in self._heads else tokens)
            until.callback(module.term.zero_)
        # The kernels get addresses: what lies there must outlive the pass.
        until.callback(lambda *kept: None, self, tokens, logits)


class KernelTerm:
    """What a kernel reads of one module's term.

    It gets addresses, so that one compiled graph serves any number of adapters.
    """

    def __init__(self, factors: Sequence[Factors], gates: Tensor) -> None:
        """Take the factors of each adapter and float32 gates (rows, adapters), scaling included."""
        self._gates = gates.contiguous()
        self._kept = [(f.a.contiguous(), f.b.T.contiguous()) for f in factors]
        self._table = torch.tensor([(a.data_ptr(), b.data_ptr(), len(a)) for a, b in self._kept])

    @property
    def ranks(self) -> int:
        """Sum of the ranks of all factors."""
        return int(self._table[:, 2].sum())

    def attach(self, module: PackedLinear, rows: Tensor) -> None:
        """Point `module` here; see `Term` in kernels.cpp.

        The caller keeps `self` and `rows`, int64 (tokens,), until it points the module elsewhere.
        """
        addresses = (self._table.data_ptr(), self._gates.data_ptr(), rows.data_ptr())
        module.term.copy_(torch.tensor([len(self._table), *addresses]))

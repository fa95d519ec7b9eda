"""Corrections of packed modules: the CPU kernels read factors where the adapters keep them."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack

import torch
from torch import Tensor

from superpose_adapters.adapter import Adapter

# Fields of a term; see `Term` in kernels.cpp.
_FIELDS = 4
_ROWS = 3


class KernelCorrection:
    """Terms that the kernels read: nothing is gathered or copied, and a gate of 0 costs nothing.

    They hold addresses, so that one compiled graph serves any number of adapters.
    """

    def __init__(
        self,
        adapters: Sequence[Adapter],
        gates: Tensor,
        terms: Tensor,
        modules: Sequence[str],
        heads: frozenset[str] = frozenset(),
    ) -> None:
        """Lay out the terms of a batch.

        Args:
            adapters: Those that any row needs, in the order of summation.
            gates: float64 (rows, adapters).
            terms: What the packed modules read, int64 (modules, 4); all zeros: nothing.
            modules: Their names.
            heads: Those that see only the tokens whose logits are wanted.
        """
        self._terms = terms
        self._own = torch.zeros(len(modules), _FIELDS, dtype=torch.int64)
        self._heads = [i for i, name in enumerate(modules) if name in heads]
        # What lies at the addresses.
        self._kept: list[Tensor] = []
        for i, name in enumerate(modules):
            columns = [c for c, adapter in enumerate(adapters) if name in adapter.modules]
            if columns:
                factors = [adapters[c].modules[name] for c in columns]
                scaling = torch.tensor([f.scaling for f in factors], dtype=torch.float64)
                scaled = (gates[:, columns] * scaling).float().contiguous()
                pairs = [(f.a.contiguous(), f.b.T.contiguous()) for f in factors]
                table = torch.tensor([(a.data_ptr(), b.data_ptr(), len(a)) for a, b in pairs])
                self._own[i, :_ROWS] = torch.tensor(
                    [len(table), table.data_ptr(), scaled.data_ptr()]
                )
                self._kept += [scaled, table, *(tensor for pair in pairs for tensor in pair)]

    def attach(self, tokens: Tensor, logits: Tensor, until: ExitStack) -> None:
        """See `Correction`."""
        self._own[:, _ROWS] = tokens.data_ptr()
        self._own[self._heads, _ROWS] = logits.data_ptr()
        self._terms.copy_(self._own)
        until.callback(self._terms.zero_)
        # The rows too must outlive the pass.
        until.callback(lambda *kept: None, self, tokens, logits)

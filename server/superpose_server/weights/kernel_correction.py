"""Corrections of packed modules: the CPU kernels read factors by address."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack

import torch
from torch import Tensor

from superpose_adapters.adapter import Adapter
from superpose_server.model.packed import TERM_FIELDS
from superpose_server.weights.kernel_factors import KernelFactors

# The last two fields of a term, which each pass sets: where the row of each token lies, and the
# number of tokens. See `Term` in kernels/corrections.h.
_ROWS = slice(TERM_FIELDS - 2, TERM_FIELDS)


class KernelCorrection:
    """Terms that the kernels read: nothing is gathered or copied, and a gate of 0 costs nothing.

    They hold addresses, so that one compiled graph serves any number of adapters, and how much lies
    there: a module that sees other tokens, or has another size, is an error and not a read of
    whatever comes next.
    """

    def __init__(
        self,
        adapters: Sequence[Adapter],
        gates: Tensor,
        factors: KernelFactors,
        terms: Tensor,
        modules: Sequence[str],
        heads: frozenset[str] = frozenset(),
    ) -> None:
        """Lay out the terms of a batch.

        Args:
            adapters: Those that any row needs, in the order of summation.
            gates: float64 (rows, adapters).
            factors: Theirs, in the dtype of the modules.
            terms: What the packed modules read, int64 (modules, TERM_FIELDS); all zeros: nothing.
            modules: Their names.
            heads: Those that see only the tokens whose logits are wanted.

        Raises:
            ValueError: Factors of one module are not of one size.
        """
        self._terms = terms
        self._own = torch.zeros(len(modules), TERM_FIELDS, dtype=torch.int64)
        self._heads = [i for i, name in enumerate(modules) if name in heads]
        # What lies at the addresses.
        self._kept: list[Tensor] = []
        for i, name in enumerate(modules):
            columns = [c for c, adapter in enumerate(adapters) if name in adapter.modules]
            if columns:
                pairs = factors.of([adapters[c] for c in columns], name)
                scaling = torch.tensor(
                    [adapters[c].modules[name].scaling for c in columns], dtype=torch.float64
                )
                scaled = (gates[:, columns] * scaling).float().contiguous()
                table = torch.tensor([(p.a.data_ptr(), p.b.data_ptr(), len(p.a)) for p in pairs])
                one = pairs[0]
                of_factors = (len(table), table.data_ptr(), one.a.element_size())
                of_module = (one.a.shape[1], one.out_features)
                of_gates = (scaled.data_ptr(), len(scaled))
                fields = of_factors + of_module + of_gates
                self._own[i, : _ROWS.start] = torch.tensor(fields)
                self._kept += (scaled, table, *(factor for p in pairs for factor in (p.a, p.b)))

    def attach(self, tokens: Tensor, logits: Tensor, until: ExitStack) -> None:
        """See `Correction`."""
        self._own[:, _ROWS] = torch.tensor((tokens.data_ptr(), len(tokens)))
        self._own[self._heads, _ROWS] = torch.tensor((logits.data_ptr(), len(logits)))
        self._terms.copy_(self._own)
        until.callback(self._terms.zero_)
        # The rows too must outlive the pass.
        until.callback(lambda *kept: None, self, tokens, logits)

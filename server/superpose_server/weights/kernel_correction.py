"""Corrections of packed modules: the CPU kernels read factors where the adapters keep them."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack

import torch
from torch import Tensor

from superpose_adapters.adapter import Adapter, Factors
from superpose_server.model.packed import TERM_FIELDS

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
        terms: Tensor,
        modules: Sequence[str],
        heads: frozenset[str] = frozenset(),
    ) -> None:
        """Lay out the terms of a batch.

        Args:
            adapters: Those that any row needs, in the order of summation.
            gates: float64 (rows, adapters).
            terms: What the packed modules read, int64 (modules, TERM_FIELDS); all zeros: nothing.
            modules: Their names.
            heads: Those that see only the tokens whose logits are wanted.

        Raises:
            ValueError: Factors of one module are not of one size, or not float32.
        """
        self._terms = terms
        self._own = torch.zeros(len(modules), TERM_FIELDS, dtype=torch.int64)
        self._heads = [i for i, name in enumerate(modules) if name in heads]
        # What lies at the addresses.
        self._kept: list[Tensor] = []
        for i, name in enumerate(modules):
            columns = [c for c, adapter in enumerate(adapters) if name in adapter.modules]
            if columns:
                factors = [adapters[c].modules[name] for c in columns]
                inputs, outputs = _size_of(name, factors)
                scaling = torch.tensor([f.scaling for f in factors], dtype=torch.float64)
                scaled = (gates[:, columns] * scaling).float().contiguous()
                pairs = [(f.a.contiguous(), f.b.T.contiguous()) for f in factors]
                table = torch.tensor([(a.data_ptr(), b.data_ptr(), len(a)) for a, b in pairs])
                of_factors = (len(table), table.data_ptr(), inputs, outputs)
                of_gates = (scaled.data_ptr(), len(scaled))
                self._own[i, : _ROWS.start] = torch.tensor(of_factors + of_gates)
                self._kept += [scaled, table, *(tensor for pair in pairs for tensor in pair)]

    def attach(self, tokens: Tensor, logits: Tensor, until: ExitStack) -> None:
        """See `Correction`."""
        self._own[:, _ROWS] = torch.tensor((tokens.data_ptr(), len(tokens)))
        self._own[self._heads, _ROWS] = torch.tensor((logits.data_ptr(), len(logits)))
        self._terms.copy_(self._own)
        until.callback(self._terms.zero_)
        # The rows too must outlive the pass.
        until.callback(lambda *kept: None, self, tokens, logits)


def _size_of(name: str, factors: Sequence[Factors]) -> tuple[int, int]:
    """Return the number of input and output features that all of `factors` are for.

    That the module has them too is checked by the kernel.
    """
    inputs, outputs = factors[0].a.shape[1], factors[0].b.shape[0]
    for f in factors:
        fit = f.a.shape == (f.rank, inputs) and f.b.shape == (outputs, f.rank)
        if not fit or f.a.dtype != torch.float32 or f.b.dtype != torch.float32:
            raise ValueError(
                f"factors of {name} are {tuple(f.a.shape)} and {tuple(f.b.shape)}, {f.a.dtype} and "
                f"{f.b.dtype}: float32 ({f.rank}, {inputs}) and ({outputs}, {f.rank}) expected"
            )
    return inputs, outputs

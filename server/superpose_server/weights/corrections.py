"""Corrections: what a row adds when its mix is not the resident one.

    y = x W(r) + ((x A_cat^T) * gate) B_cat^T,    gate = m - r

with one gate per row and adapter, spread over the adapter's ranks. With every gate at 0 there is no
correction: no LoRA arithmetic and not even a hook on any module.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Protocol, cast

import torch
from torch import Tensor, nn

from superpose_adapters.adapter import Adapter, Factors
from superpose_adapters.fold import concatenate_factors
from superpose_adapters.mix import BoundMix
from superpose_server.model.batch import Span
from superpose_server.model.packed import PackedLinear


class Term(Protocol):
    """The low-rank term of one module under one plan."""

    def attach(self, module: nn.Module, rows: Tensor) -> Callable[[], None]:
        """Let `module` add the term to what it gives; returns how to end that.

        Args:
            module: A module of the model.
            rows: int64 (tokens,), row of each token of the batches that run meanwhile.
        """
        ...


class KernelTerm:
    """Factors where the adapters keep them: the kernel reads those that a row's gates name.

    The kernel gets addresses, so that one compiled graph serves any number of adapters.
    """

    def __init__(self, factors: Sequence[Factors], gates: Tensor) -> None:
        """Take the factors of each adapter and float32 gates (rows, adapters), scaling included."""
        self._gates = gates.contiguous()
        self._kept = [(f.a.contiguous(), f.b.T.contiguous()) for f in factors]
        self._table = torch.tensor([(a.data_ptr(), b.data_ptr(), len(a)) for a, b in self._kept])

    def attach(self, module: nn.Module, rows: Tensor) -> Callable[[], None]:
        """See `Term` in kernels.cpp. The caller keeps `self` and `rows` until the end."""
        header = cast(PackedLinear, module).term
        table, gates = self._table, self._gates
        header.copy_(
            torch.tensor([len(table), table.data_ptr(), gates.data_ptr(), rows.data_ptr()])
        )

        def detach() -> None:
            header.zero_()

        return detach


@dataclass(frozen=True)
class DenseTerm:
    """Two thin products over the concatenated factors, gates of 0 included.

    Attributes:
        a: float32 (in, R).
        b: float32 (R, out), scaling included.
        gates: float32 (rows, R).
    """

    a: Tensor
    b: Tensor
    gates: Tensor

    def attach(self, module: nn.Module, rows: Tensor) -> Callable[[], None]:
        """Hook the module."""

        def correct(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
            gates = self.gates[rows[: output.shape[-2]]]
            # A gate of 0 must win over factors so large that the product overflows.
            low = torch.where(gates == 0, 0.0, (inputs[0].float() @ self.a) * gates)
            return (output.float() + low @ self.b).to(output.dtype)

        return module.register_forward_hook(correct).remove


@dataclass(frozen=True)
class Correction:
    """The terms of one batch, by module, and the number of rows that need any."""

    terms: Mapping[str, Term]
    corrected_rows: int


class Corrections:
    """Adds corrections to a model's adaptable modules while a batch runs through it."""

    def __init__(
        self,
        modules: Mapping[str, nn.Module],
        device: torch.device,
        *,
        heads: Sequence[str] = (),
        kernels: bool = False,
    ) -> None:
        """Take the modules to correct.

        Args:
            modules: {name: module}.
            device: Where they are.
            heads: Names of those that see only the tokens whose logits are wanted.
            kernels: The modules are packed, and corrected by the CPU kernels.
        """
        self._heads = frozenset(heads)
        self._modules = modules
        self._device = device
        self._kernels = kernels
        self._stacks: dict[str, tuple[Tensor, Tensor]] = {}
        self._stacked: tuple[Adapter, ...] = ()
        self._plans: dict[tuple[str, ...], Correction | None] = {}

    @contextmanager
    def applied(
        self, correction: Correction | None, spans: Sequence[Span], wanted: Sequence[int]
    ) -> Iterator[None]:
        """Add `correction` to a forward pass of `spans`, of which span i is row i.

        None adds nothing and costs nothing. `wanted` is as the model gets it.
        """
        if correction is None:
            yield
            return
        index = [row for row, span in enumerate(spans) for _ in span.ids]
        # More at the end, since the model runs at least two tokens and takes two logits.
        rows = torch.tensor([*index, index[-1]], device=self._device)
        of_logits = torch.tensor([*(index[i] for i in wanted), index[0], index[0]])
        of_logits = of_logits.to(self._device)
        with ExitStack() as attached:
            for name, term in correction.terms.items():
                seen = of_logits if name in self._heads else rows
                attached.callback(term.attach(self._modules[name], seen))
            yield

    def plan(self, rows: Sequence[BoundMix], resident: BoundMix) -> Correction | None:
        """Return the correction of a batch, or None if no row needs any.

        Args:
            rows: The mix of each row.
            resident: The mix that is folded into the weights.
        """
        if all(mix is resident for mix in rows):
            return None
        key = (resident.digest, *(mix.digest for mix in rows))
        if key not in self._plans:
            self._plans[key] = self._make_plan(rows, resident)
        return self._plans[key]

    def forget(self, in_use: Sequence[BoundMix] = ()) -> None:
        """Drop plans, and factors of adapters that are in none of `in_use`, so that they are freed.

        To be called whenever a row or a job ends, or the resident mix changes: in between there are
        few plans, since only rows that join make new ones.
        """
        self._plans.clear()
        needed = {adapter for mix in in_use for adapter in mix.weights}
        if not needed.issuperset(self._stacked):
            self._stacked, self._stacks = (), {}

    def _make_plan(self, rows: Sequence[BoundMix], resident: BoundMix) -> Correction | None:
        stored = resident.weights
        gates: dict[Adapter, list[float]] = {}
        # In an order of their own: that of the rows would show in the bits of a sum.
        adapters = {adapter for mix in (*rows, resident) for adapter in mix.weights}
        for adapter in sorted(adapters, key=lambda adapter: adapter.digest):
            row_gates = [mix.weights.get(adapter, 0.0) - stored.get(adapter, 0.0) for mix in rows]
            if any(row_gates):
                gates[adapter] = row_gates
        if not gates:
            return None
        make = self._kernel_terms if self._kernels else self._dense_terms
        corrected = sum(any(g[row] != 0 for g in gates.values()) for row in range(len(rows)))
        return Correction(make(gates), corrected)

    def _kernel_terms(self, gates: Mapping[Adapter, list[float]]) -> Mapping[str, Term]:
        table = torch.tensor(list(gates.values()), dtype=torch.float64).T  # (rows, adapters)
        terms: dict[str, Term] = {}
        for name in _modules_of(gates):
            columns = [i for i, adapter in enumerate(gates) if name in adapter.modules]
            factors = [adapter.modules[name] for adapter in gates if name in adapter.modules]
            scaling = torch.tensor([f.scaling for f in factors], dtype=torch.float64)
            terms[name] = KernelTerm(factors, (table[:, columns] * scaling).float())
        return terms

    def _dense_terms(self, gates: Mapping[Adapter, list[float]]) -> Mapping[str, Term]:
        in_use = tuple(sorted(gates, key=lambda adapter: adapter.digest))
        if in_use != self._stacked:
            self._stacked, self._stacks = in_use, self._stack_factors(in_use)
        terms: dict[str, Term] = {}
        for name, (a, b) in self._stacks.items():
            columns = [
                torch.tensor(gates[adapter], dtype=torch.float32)[:, None].expand(
                    -1, adapter.modules[name].rank
                )
                for adapter in in_use
                if name in adapter.modules
            ]
            terms[name] = DenseTerm(a, b, torch.cat(columns, dim=1).to(self._device))
        return terms

    def _stack_factors(self, adapters: tuple[Adapter, ...]) -> dict[str, tuple[Tensor, Tensor]]:
        weights = dict.fromkeys(adapters, 1.0)
        stack = {}
        for name in _modules_of(weights):
            factors = concatenate_factors(weights, name)
            if factors is not None:
                # Finite, since rows whose gate is 0 are multiplied by it too.
                largest = torch.finfo(torch.float32).max
                a, b = (f.clamp(-largest, largest).to(self._device) for f in factors)
                stack[name] = (a.T, b.T)
        return stack


def _modules_of(adapters: Mapping[Adapter, object]) -> list[str]:
    """Return the names of all modules that any of `adapters` adapts."""
    return list({module: None for adapter in adapters for module in adapter.modules})

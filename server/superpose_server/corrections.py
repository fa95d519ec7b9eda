"""Corrections: what a row adds when its mix is not the resident one.

    y = x W(r) + ((x A_cat^T) * gate) B_cat^T,    gate = m - r

with one gate per row and adapter, spread over the adapter's ranks. With every gate at 0 no
correction is made and the model runs as it is: no LoRA arithmetic at all.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from superpose_adapters.adapter import Adapter
from superpose_adapters.fold import concatenate_factors
from superpose_adapters.mix import BoundMix


@dataclass(frozen=True)
class ModuleCorrection:
    """The low-rank term of one module: float32 A_cat^T (in, R), B_cat^T (R, out), gate (n, 1, R).

    n is the number of rows, or 1 if all rows share their gates.
    """

    a: Tensor
    b: Tensor
    gate: Tensor

    def add_to(self, output: Tensor, x: Tensor) -> Tensor:
        """Return output (n, tokens, out) plus the term, rounded once to the output's dtype."""
        # A gate of 0 must win over factors so large that the product overflows.
        low = torch.where(self.gate == 0, 0.0, (x.float() @ self.a) * self.gate)
        return (output.float() + low @ self.b).to(output.dtype)


@dataclass(frozen=True)
class Correction:
    """The corrections of one batch, by module, and the number of rows that need any."""

    modules: Mapping[str, ModuleCorrection]
    rows: int


class Corrections:
    """Adds corrections to a model's adaptable modules while a batch runs through it."""

    def __init__(self, modules: Mapping[str, nn.Module], device: torch.device) -> None:
        """Watch `modules`, {name: module}, whose factors are to be held on `device`."""
        self._device = device
        self._active: Correction | None = None
        self._stacks: dict[tuple[Adapter, ...], dict[str, tuple[Tensor, Tensor]]] = {}
        self._plans: dict[tuple[str, ...], Correction | None] = {}
        for name, module in modules.items():
            module.register_forward_hook(self._hook(name))

    def _hook(self, name: str):  # type: ignore[no-untyped-def]  # torch's hook type is private
        def correct(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor | None:
            if self._active is None:
                return None
            correction = self._active.modules.get(name)
            return None if correction is None else correction.add_to(output, inputs[0])

        return correct

    @contextmanager
    def applied(self, correction: Correction | None) -> Iterator[None]:
        """Add `correction` to every forward pass within."""
        self._active = correction
        try:
            yield
        finally:
            self._active = None

    def plan(self, rows: Sequence[BoundMix], resident: BoundMix) -> Correction | None:
        """Return the correction of a batch, or None if no row needs any.

        Args:
            rows: The mix of each row.
            resident: The mix that is folded into the weights.
        """
        key = (resident.digest, *(mix.digest for mix in rows))
        if key not in self._plans:
            self._plans[key] = self._make_plan(rows, resident)
        return self._plans[key]

    def forget(self) -> None:
        """Drop plans and factors, so that adapters that no row needs are freed.

        To be called whenever a row or a job ends, or the resident mix changes: in between there are
        few plans, since only rows that join make new ones.
        """
        self._plans.clear()
        self._stacks.clear()

    def _make_plan(self, rows: Sequence[BoundMix], resident: BoundMix) -> Correction | None:
        stored = resident.weights
        gates: dict[Adapter, list[float]] = {}
        for adapter in {a: None for mix in (*rows, resident) for a in mix.weights}:
            row_gates = [mix.weights.get(adapter, 0.0) - stored.get(adapter, 0.0) for mix in rows]
            if any(row_gates):
                gates[adapter] = row_gates
        if not gates:
            return None
        in_use = tuple(sorted(gates, key=lambda adapter: adapter.digest))
        if in_use not in self._stacks:
            self._stacks[in_use] = self._stack_factors(in_use)
        modules = {}
        for name, (a, b) in self._stacks[in_use].items():
            columns = [
                torch.tensor(gates[adapter], dtype=torch.float32)[:, None].expand(
                    -1, adapter.modules[name].rank
                )
                for adapter in in_use
                if name in adapter.modules
            ]
            gate = torch.cat(columns, dim=1)[:, None, :].to(self._device)
            modules[name] = ModuleCorrection(a, b, gate)
        corrected = sum(any(g[row] != 0 for g in gates.values()) for row in range(len(rows)))
        return Correction(modules, corrected)

    def _stack_factors(self, adapters: tuple[Adapter, ...]) -> dict[str, tuple[Tensor, Tensor]]:
        weights = dict.fromkeys(adapters, 1.0)
        stack = {}
        for name in {module: None for adapter in adapters for module in adapter.modules}:
            factors = concatenate_factors(weights, name)
            if factors is not None:
                # Finite, since rows whose gate is 0 are multiplied by it too.
                largest = torch.finfo(torch.float32).max
                a, b = (f.clamp(-largest, largest).to(self._device) for f in factors)
                stack[name] = (a.T, b.T)
        return stack

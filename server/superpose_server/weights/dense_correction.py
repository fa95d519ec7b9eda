"""Corrections of plain modules, on any device: hooks with two thin products."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from superpose_adapters.adapter import Adapter

# Elements between the beginnings of two modules' factors are a multiple of this, 16 bytes.
_ALIGNED = 4
_FINITE = torch.finfo(torch.float32).max


class FactorStack:
    """Factors of several adapters on one device, side by side in every module.

    An adapter has the same ranks, of all `ranks` that there are, in every module; where it adapts
    nothing they are zeros. All lies in one tensor, (ranks, features of all modules), so that an
    adapter gets there by one copy. Addresses stay, so that captured steps can read from here.

    Attributes:
        a: {module: float32 (ranks, in)}.
        b: {module: float32 (ranks, out)}, scaling included.
    """

    def __init__(
        self, shapes: Mapping[str, tuple[int, int]], ranks: int, device: torch.device
    ) -> None:
        """Make an empty stack.

        Args:
            shapes: {module: (in, out)} of those that may be adapted.
            ranks: Room, in ranks of all adapters together.
            device: Where it lies.
        """
        self.ranks = ranks
        self._places: dict[tuple[str, int], slice] = {}
        width = 0
        for name, shape in shapes.items():
            for side, features in enumerate(shape):
                self._places[name, side] = slice(width, width + features)
                width += -(-features // _ALIGNED) * _ALIGNED
        self._all = torch.zeros(ranks, width, dtype=torch.float32, device=device)
        self.a = {name: self._all[:, self._places[name, 0]] for name in shapes}
        self.b = {name: self._all[:, self._places[name, 1]] for name in shapes}
        # By digest, so that no adapter is kept alive for having been here.
        self._columns: dict[str, slice] = {}

    @classmethod
    def of(cls, adapters: Sequence[Adapter], device: torch.device) -> FactorStack:
        """Return a stack that has room for `adapters` alone, and holds them."""
        shapes = {
            name: (factors.a.shape[1], factors.b.shape[0])
            for adapter in adapters
            for name, factors in adapter.modules.items()
        }
        stack = cls(shapes, sum(adapter.rank for adapter in adapters), device)
        stack.add(adapters)
        return stack

    def holds(self, adapters: Sequence[Adapter]) -> bool:
        """Return whether all of `adapters` are here."""
        return all(adapter.digest in self._columns for adapter in adapters)

    def clear(self) -> None:
        """Make room."""
        self._columns = {}

    @torch.inference_mode()
    def add(self, adapters: Sequence[Adapter]) -> bool:
        """Put those of `adapters` here that are not; False, and no change, if they do not fit."""
        new = [adapter for adapter in adapters if adapter.digest not in self._columns]
        used = max((columns.stop for columns in self._columns.values()), default=0)
        fits = used + sum(adapter.rank for adapter in new) <= self.ranks
        if not fits or not all(adapter.modules.keys() <= self.a.keys() for adapter in new):
            return False
        for adapter in new:
            rows = torch.zeros(adapter.rank, self._all.shape[1], dtype=torch.float32)
            for name, factors in adapter.modules.items():
                # Finite, since rows whose gate is 0 are multiplied by it too.
                a = factors.a.clamp(-_FINITE, _FINITE)
                b = (factors.b.double() * factors.scaling).float().clamp(-_FINITE, _FINITE)
                rows[: len(a), self._places[name, 0]] = a
                rows[: len(a), self._places[name, 1]] = b.T
            columns = slice(used, used + adapter.rank)
            self._all[columns] = rows.to(self._all.device)
            self._columns[adapter.digest] = columns
            used = columns.stop
        return True

    def spread(self, adapters: Sequence[Adapter], gates: Tensor) -> Tensor:
        """Return float32 (rows, ranks) from gates (rows, adapters) of adapters that are here."""
        spread = torch.zeros(len(gates), self.ranks, dtype=torch.float32)
        for adapter, of_rows in zip(adapters, gates.T, strict=True):
            spread[:, self._columns[adapter.digest]] = of_rows[:, None].float()
        return spread.to(self._all.device)


@dataclass(frozen=True)
class DenseCorrection:
    """Two thin products a module over the factors of a stack, gates of 0 included.

    Attributes:
        stack: The factors.
        gates: float32 (rows, ranks of the stack).
        modules: {name: module}, those of the stack among them.
        heads: Modules that see only the tokens whose logits are wanted.
    """

    stack: FactorStack
    gates: Tensor
    modules: Mapping[str, nn.Module]
    heads: frozenset[str]

    def attach(self, tokens: Tensor, logits: Tensor, until: ExitStack) -> None:
        """See `Correction`."""
        of_tokens = self.gates[tokens]
        of_logits = self.gates[logits] if self.heads & self.stack.a.keys() else of_tokens
        for name, a in self.stack.a.items():
            gates = of_logits if name in self.heads else of_tokens
            hook = _Hook(a, self.stack.b[name], gates)
            until.callback(self.modules[name].register_forward_hook(hook).remove)


class _Hook:
    """Adds a module's term to its output (..., tokens, out)."""

    def __init__(self, a: Tensor, b: Tensor, gates: Tensor) -> None:
        self._a, self._b, self._gates = a.T, b, gates

    def __call__(self, module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        # A gate of 0 must win over factors so large that the product overflows.
        low = torch.where(self._gates == 0, 0.0, (inputs[0].float() @ self._a) * self._gates)
        return (output.float() + low @ self._b).to(output.dtype)

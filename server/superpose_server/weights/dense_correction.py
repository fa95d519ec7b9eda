"""Corrections of plain modules, on any device: hooks with two thin products."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from superpose_adapters.adapter import Adapter
from superpose_server.weights.bits import same_bits

# Elements between the beginnings of two modules' factors are a multiple of this, 16 bytes.
_ALIGNED = 4


class FactorStack:
    """Factors of several adapters on one device, side by side in every module.

    An adapter has the same ranks, of all `ranks` that there are, in every module; where it adapts
    nothing they are zeros. All lies in one tensor, (ranks, features of all modules), so that an
    adapter gets there by one copy. Addresses stay, so that captured steps can read from here.

    Attributes:
        a: {module: (ranks, in)}.
        b: {module: (ranks, out)}, scaling included.
    """

    def __init__(
        self,
        shapes: Mapping[str, tuple[int, int]],
        ranks: int,
        device: torch.device,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        """Make an empty stack.

        Args:
            shapes: {module: (in, out)} of those that may be adapted.
            ranks: Room, in ranks of all adapters together.
            device: Where it lies.
            dtype: Of the factors. In that of the model a term needs fewer launches on a GPU. In
                bfloat16 it is rounded at four places, A, B, the gate and between the products, each
                by as much, relatively, as the output that it is added to.
        """
        self.ranks = ranks
        self._places: dict[tuple[str, int], slice] = {}
        width = 0
        for name, shape in shapes.items():
            for side, features in enumerate(shape):
                self._places[name, side] = slice(width, width + features)
                width += -(-features // _ALIGNED) * _ALIGNED
        self._all = torch.zeros(ranks, width, dtype=dtype, device=device)
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

    def could_hold(self, adapters: Sequence[Adapter]) -> bool:
        """Return whether `adapters` would fit if nothing else were here."""
        return sum(adapter.rank for adapter in adapters) <= self.ranks and all(
            adapter.modules.keys() <= self.a.keys() for adapter in adapters
        )

    def clear(self) -> None:
        """Make room."""
        self._columns = {}

    @torch.inference_mode()
    def add(self, adapters: Sequence[Adapter]) -> bool:
        """Put those of `adapters` here that are not; False, and no change, if there is no room."""
        new = [adapter for adapter in adapters if adapter.digest not in self._columns]
        used = max((columns.stop for columns in self._columns.values()), default=0)
        if used + sum(adapter.rank for adapter in new) > self.ranks:
            return False
        for adapter in new:
            columns = slice(used, used + adapter.rank)
            self._all[columns] = self._arrange(adapter)
            self._columns[adapter.digest] = columns
            used = columns.stop
        return True

    @torch.inference_mode()
    def compare(self, adapter: Adapter) -> Iterator[tuple[bool, int]]:
        """Yield, for each module, whether what is here of an adapter is whole, and its bytes.

        Nothing of one that is not here, or has to make room meanwhile.
        """
        for name in self.a:
            columns = self._columns.get(adapter.digest)
            if columns is None:
                return
            kept = self.a[name][columns], self.b[name][columns]
            fresh = (factor.to(self._all) for factor in self._factors_of(adapter, name))
            yield all(map(same_bits, kept, fresh)), sum(factor.nbytes for factor in kept)

    def _arrange(self, adapter: Adapter) -> Tensor:
        """Return the ranks (rank, features of all modules) of an adapter."""
        rows = torch.zeros(adapter.rank, self._all.shape[1], dtype=torch.float32)
        for name in adapter.modules:
            for side, factor in enumerate(self._factors_of(adapter, name)):
                rows[:, self._places[name, side]] = factor
        return rows.to(self._all)

    def _factors_of(self, adapter: Adapter, module: str) -> tuple[Tensor, Tensor]:
        """Return A (rank, in) and B (rank, out) of an adapter, with zeros for ranks that it lacks.

        Finite, since rows whose gate is 0 are multiplied by them too.
        """
        largest = torch.finfo(self._all.dtype).max
        a = torch.zeros(adapter.rank, self.a[module].shape[1], dtype=torch.float32)
        b = torch.zeros(adapter.rank, self.b[module].shape[1], dtype=torch.float32)
        factors = adapter.modules.get(module)
        if factors is not None:
            a[: factors.rank] = factors.a.clamp(-largest, largest)
            scaled = (factors.b.double() * factors.scaling).float()
            b[: factors.rank] = scaled.clamp(-largest, largest).T
        return a, b

    def spread(self, adapters: Sequence[Adapter], gates: Tensor) -> Tensor:
        """Return gates (rows, ranks) from those (rows, adapters) of adapters that are here."""
        spread = torch.zeros(len(gates), self.ranks, dtype=torch.float32)
        for adapter, of_rows in zip(adapters, gates.T, strict=True):
            spread[:, self._columns[adapter.digest]] = of_rows[:, None].float()
        return spread.to(self._all)


@dataclass(frozen=True)
class DenseCorrection:
    """Two thin products a module over the factors of a stack, gates of 0 included.

    Attributes:
        stack: The factors.
        gates: (rows, ranks of the stack), in its dtype.
        modules: {name: module}, those of the stack among them.
        heads: Modules that see only the tokens whose logits are wanted.
    """

    stack: FactorStack
    gates: Tensor
    modules: Mapping[str, nn.Module]
    heads: frozenset[str]

    def attach(self, tokens: Tensor, logits: Tensor, until: ExitStack) -> None:
        """See `Correction`."""
        # The gates of a row that has a pass to itself are those of whatever a module sees.
        alone = len(self.gates) == 1
        gates = self.gates if alone else self.gates[tokens]
        of_logits = of_tokens = gates, gates == 0
        if self.heads & self.stack.a.keys() and not alone:
            of_logits = (gates := self.gates[logits]), gates == 0
        for name, a in self.stack.a.items():
            hook = _Hook(a, self.stack.b[name], *(of_logits if name in self.heads else of_tokens))
            until.callback(self.modules[name].register_forward_hook(hook).remove)


class _Hook:
    """Adds a module's term to its output (..., tokens, out)."""

    def __init__(self, a: Tensor, b: Tensor, gates: Tensor, silent: Tensor) -> None:
        self._a, self._b, self._gates, self._silent = a.T, b, gates, silent

    def __call__(self, module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        low = inputs[0].to(self._a.dtype) @ self._a
        # A gate of 0 must win over factors so large that the product overflows.
        low = (low * self._gates).masked_fill(self._silent, 0.0)
        flat = output.reshape(-1, output.shape[-1]).to(low.dtype)
        return flat.addmm(low.view(-1, low.shape[-1]), self._b).view(output.shape).to(output.dtype)

"""Corrections: what a row adds when its mix is not the resident one (an unmerged LoRA, elsewhere).

    y = x W(r) + ((x A_cat^T) * gate) B_cat^T,    gate = m - r

with one gate per row and adapter, spread over the adapter's ranks. With every gate at 0 there is no
correction: no LoRA arithmetic and not even a hook on any module.
"""

from __future__ import annotations

from collections.abc import Collection, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Protocol

import torch
from torch import Tensor, nn

from superpose_adapters.adapter import Adapter
from superpose_adapters.mix import BoundMix
from superpose_server.model.batch import Batch
from superpose_server.weights.dense_correction import DenseCorrection, FactorStack
from superpose_server.weights.kernel_correction import KernelCorrection
from superpose_server.weights.kernel_factors import KernelFactors
from superpose_server.weights.pace import Pace

# A plan holds tensors for each module; that many are a few megabytes.
_MOST_PLANS = 64


class Correction(Protocol):
    """The low-rank terms of one batch of rows."""

    def attach(self, tokens: Tensor, logits: Tensor, until: ExitStack) -> None:
        """Let modules add their terms to what they give, until `until` is closed.

        Args:
            tokens: int64 (tokens,), the row of each token that runs meanwhile.
            logits: int64 (logits,), the row of each token that the head sees.
            until: Undoes it.
        """
        ...


class Corrections:
    """Adds corrections to a model's adaptable modules while a batch runs through it."""

    def __init__(
        self,
        modules: Mapping[str, nn.Module],
        device: torch.device,
        *,
        heads: Collection[str] = (),
        terms: Tensor | None = None,
        pool: FactorStack | None = None,
    ) -> None:
        """Take the modules to correct.

        Args:
            modules: {name: module}.
            device: Where they are.
            heads: Names of those that see only the tokens whose logits are wanted.
            terms: The terms of packed modules, int64 (modules, TERM_FIELDS) in their order, which
                the CPU kernels read; None: the modules are plain.
            pool: Where factors are put as long as they fit, so that captured steps find them.
        """
        self._heads = frozenset(heads)
        self._modules = modules
        self._device = device
        self._terms = terms
        self._factors = KernelFactors(_dtype_of(modules))
        self._pool = pool
        # The factors of the last batch that the pool had no room for, and whose they are.
        self._stack: FactorStack | None = None
        self._stacked: tuple[Adapter, ...] = ()
        self._plans: dict[tuple[str, ...], Correction | None] = {}
        self._gates: dict[tuple[str, str], Mapping[Adapter, float]] = {}

    @contextmanager
    def applied(self, correction: Correction | None, batch: Batch, keep: Tensor) -> Iterator[None]:
        """Add `correction` to a forward pass of `batch` that gives the logits at `keep`.

        Row i of the correction is that of span i. None adds nothing and costs nothing.
        """
        if correction is None:
            yield
            return
        with ExitStack() as until:
            correction.attach(batch.rows, batch.rows[keep], until)
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
            if len(self._plans) >= _MOST_PLANS:
                self._plans.clear()
            self._plans[key] = self._make_plan(rows, resident)
        return self._plans[key]

    def count(self, rows: Sequence[BoundMix], resident: BoundMix) -> int:
        """Return how many of `rows` need a correction."""
        return sum(mix is not resident and bool(self._gates_of(mix, resident)) for mix in rows)

    def forget(self, in_use: Sequence[BoundMix] = ()) -> None:
        """Drop plans, and factors of adapters that are in none of `in_use`, so that they are freed.

        To be called whenever a row or a job ends, or the resident mix changes. In between rows that
        join make new plans, and so does each slice of texts that are scored under many mixes.
        """
        self._plans.clear()
        self._gates.clear()
        needed = {adapter for mix in in_use for adapter in mix.weights}
        if not needed.issuperset(self._stacked):
            self._stacked, self._stack = (), None

    def check(self, adapters: Iterable[Adapter]) -> Generator[bool, None, tuple[str, ...]]:
        """Return the digests of those of `adapters` whose factors are kept here with other bits.

        Yields after a few MiB. Gates and tables are not looked at: they last as long as a batch.
        """
        damaged = []
        pace = Pace()
        for adapter in adapters:
            whole = True
            for kept in (self._factors, self._pool, self._stack):
                for same, nbytes in kept.compare(adapter) if kept is not None else ():
                    whole &= same
                    if pace.due(nbytes):
                        yield True
            if not whole:
                damaged.append(adapter.digest)
        return tuple(damaged)

    def clear(self) -> None:
        """Drop everything, so that whatever is needed is made anew from the adapters."""
        self.forget()
        self._factors = KernelFactors(_dtype_of(self._modules))
        if self._pool is not None:
            self._pool.clear()

    def _make_plan(self, rows: Sequence[BoundMix], resident: BoundMix) -> Correction | None:
        differences = [self._gates_of(mix, resident) for mix in rows]
        # In an order of their own: that of the rows would show in the bits of a sum.
        adapters = sorted({a for gates in differences for a in gates}, key=lambda a: a.digest)
        if not adapters:
            return None
        table = torch.tensor(
            [[gates.get(adapter, 0.0) for adapter in adapters] for gates in differences],
            dtype=torch.float64,
        )
        if self._terms is not None:
            return KernelCorrection(
                adapters, table, self._factors, self._terms, list(self._modules), self._heads
            )
        stack = self._place(tuple(adapters))
        return self.dense(stack, stack.spread(adapters, table))

    def dense(self, stack: FactorStack, gates: Tensor) -> DenseCorrection:
        """Return the correction of plain modules by `stack`, gates (rows, ranks) in its dtype."""
        return DenseCorrection(stack, gates, self._modules, self._heads)

    def _gates_of(self, mix: BoundMix, resident: BoundMix) -> Mapping[Adapter, float]:
        """Return m - r per adapter, where it is not 0."""
        key = (mix.digest, resident.digest)
        if key not in self._gates:
            asked, stored = mix.weights, resident.weights
            adapters = asked.keys() | stored.keys()
            gates = {a: asked.get(a, 0.0) - stored.get(a, 0.0) for a in adapters}
            self._gates[key] = {adapter: gate for adapter, gate in gates.items() if gate != 0}
        return self._gates[key]

    def _place(self, adapters: tuple[Adapter, ...]) -> FactorStack:
        """Return a stack that holds the factors of `adapters`."""
        if self._pool is not None and self._pool.could_hold(adapters):
            if not self._pool.add(adapters):
                # Plans that were made point at columns that others get now.
                self._plans.clear()
                self._pool.clear()
                self._pool.add(adapters)
            return self._pool
        if self._stack is None or adapters != self._stacked:
            self._stacked, self._stack = adapters, FactorStack.of(adapters, self._device)
        return self._stack


def _dtype_of(modules: Mapping[str, nn.Module]) -> torch.dtype:
    return next(p.dtype for module in modules.values() for p in module.parameters())

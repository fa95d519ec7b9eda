"""LoRA factors of many adapters over one frozen base, and the step that changes them.

Rows of a batch belong to the adapters in turn, equally many to each, so that one batched product
a module serves all. No sum ever runs over two adapters: each goes its own way, as if alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from superpose_train.peft_names import Factors

# As transformers.Trainer sets them.
MAX_GRADIENT_NORM = 1.0
BETAS = (0.9, 0.999)
EPSILON = 1e-8


@dataclass(frozen=True)
class Shape:
    """Where the modules' factors lie in an adapter's row of parameters: A, B, A, B, ...

    Attributes:
        modules: (name, in_features, out_features) of the adapted modules.
        rank: Of the widest adapter; those of the others end in zeros.

    Those zeros stay exactly zero: where a row of A and the column of B that meets it are both
    zero, both gradients are products with zero, and AdamW without weight decay moves a
    parameter of zero gradients by 0 / (0 + epsilon).
    """

    modules: tuple[tuple[str, int, int], ...]
    rank: int

    @property
    def sizes(self) -> list[int]:
        """Numbers of parameters of A, B, A, B, ..."""
        return [
            self.rank * width for _, inputs, outputs in self.modules for width in (inputs, outputs)
        ]

    def factors(self, parameters: Tensor) -> Factors:
        """Return {module: (A (n, rank, in), B (n, out, rank))}, views of parameters (n, total)."""
        # One split for all: its gradient is one concatenation.
        parts = iter(torch.split(parameters, self.sizes, dim=1))
        count = len(parameters)
        return {
            name: (
                next(parts).view(count, self.rank, inputs),
                next(parts).view(count, outputs, self.rank),
            )
            for name, inputs, outputs in self.modules
        }

    def pack(self, factors: Factors) -> Tensor:
        """Return the row (total,) of one adapter's A (r, in) and B (out, r), r at most rank."""
        row = torch.zeros(sum(self.sizes))
        for name, (wide_a, wide_b) in self.factors(row.unsqueeze(0)).items():
            a, b = factors[name]
            wide_a[0, : len(a)] = a
            wide_b[0, :, : b.shape[1]] = b
        return row

    def unpack(self, row: Tensor, rank: int) -> Factors:
        """Return one adapter's A (r, in) and B (out, r)."""
        return {
            name: (a[0, :rank], b[0, :, :rank])
            for name, (a, b) in self.factors(row.unsqueeze(0)).items()
        }

    def factor_mask(self, rank: int, *, train_a: bool) -> Tensor:
        """Return (total,): 1 where an adapter of this rank is trained."""
        return self.pack(
            {
                name: (
                    torch.full((rank, inputs), float(train_a)),
                    torch.ones(outputs, rank),
                )
                for name, inputs, outputs in self.modules
            }
        )


class Corrector:
    """Hooks that add scaling * (x A^T) B^T to the adapted modules' outputs, given factors."""

    def __init__(self, model: nn.Module, shape: Shape) -> None:
        """Hook the modules of `shape`; without factors the model stays the base."""
        self._factors: Factors = {}
        self._scaling: Tensor | None = None
        self._dropout: Dropout | None = None
        self._handles = [
            model.get_submodule(name).register_forward_hook(self._hook(name))
            for name, _, _ in shape.modules
        ]

    @contextmanager
    def using(
        self, factors: Factors, scaling: Tensor, dropout: Dropout | None = None
    ) -> Iterator[None]:
        """Correct with these factors of n adapters; scaling is (n, 1, 1)."""
        self._factors, self._scaling, self._dropout = factors, scaling, dropout
        try:
            yield
        finally:
            self._factors, self._scaling, self._dropout = {}, None, None

    def remove(self) -> None:
        """Take the hooks off."""
        for handle in self._handles:
            handle.remove()

    def _hook(self, name: str) -> Any:
        def correct(_: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor | None:
            if self._scaling is None:
                return None
            a, b = self._factors[name]
            count = len(a)
            x = inputs[0]
            if self._dropout is not None:
                x = self._dropout(x)
            low = torch.bmm(x.reshape(count, -1, x.shape[-1]), a.transpose(1, 2)) * self._scaling
            wide = output.reshape(count, -1, output.shape[-1])
            return torch.baddbmm(wide, low.to(wide.dtype), b.transpose(1, 2).to(wide.dtype)).view(
                output.shape
            )

        return correct


class Dropout:
    """Dropout whose random numbers belong to one adapter each, whoever shares the batch."""

    def __init__(
        self,
        shares: Sequence[float],
        generators: Sequence[torch.Generator],
        shapes: Sequence[tuple[int, int]],
    ) -> None:
        """Take each adapter's share, generator, and (rows, longest row) without the padding."""
        self._shares = shares
        self._generators = generators
        self._shapes = shapes

    def __call__(self, x: Tensor) -> Tensor:
        """Drop elements of x (adapters * rows, longest, in)."""
        mask = torch.ones_like(x).view(len(self._shares), -1, *x.shape[1:])
        for at, (share, generator, (rows, longest)) in enumerate(
            zip(self._shares, self._generators, self._shapes, strict=True)
        ):
            if share:
                # Drawn in the adapter's own shape: its padding depends on its companions.
                drawn = torch.rand(rows, longest, x.shape[-1], generator=generator, device=x.device)
                mask[at, :rows, :longest] = (drawn >= share).to(mask.dtype) / (1 - share)
        return x * mask.view_as(x)


@dataclass
class StackedAdamW:
    """AdamW of n adapters with a learning rate each, gradients clipped adapter by adapter.

    Attributes:
        parameters: (n, total).
        mask: (n, total), 0 where nothing is trained.
        first: (n, total), running mean of the gradients.
        second: (n, total), running mean of their squares.
    """

    parameters: Tensor
    mask: Tensor
    first: Tensor
    second: Tensor

    @torch.no_grad()
    def step(self, gradients: Tensor, learning_rates: Sequence[float], count: int) -> None:
        """Take step number `count`, from 1."""
        gradients = gradients * self.mask
        norms = gradients.square().sum(1, keepdim=True).sqrt()
        gradients.mul_((MAX_GRADIENT_NORM / (norms + 1e-6)).clamp(max=1.0))
        self.first.lerp_(gradients, 1 - BETAS[0])
        self.second.mul_(BETAS[1]).addcmul_(gradients, gradients, value=1 - BETAS[1])
        root = self.second.sqrt().div_((1 - BETAS[1] ** count) ** 0.5).add_(EPSILON)
        sizes = torch.tensor(learning_rates, dtype=torch.float64) / (1 - BETAS[0] ** count)
        self.parameters.addcdiv_(
            self.first * sizes.to(self.parameters).unsqueeze(1), root, value=-1
        )

    def keep(self, rows: Sequence[int]) -> StackedAdamW:
        """Return the state of the adapters in `rows` alone."""
        index = torch.tensor(rows, dtype=torch.long, device=self.parameters.device)
        return StackedAdamW(
            *(
                tensor.index_select(0, index)
                for tensor in (self.parameters, self.mask, self.first, self.second)
            )
        )

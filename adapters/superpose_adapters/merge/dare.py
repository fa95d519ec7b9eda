"""DARE: entries of each delta are dropped at random, and the others enlarged to make up for it."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from superpose_adapters.merge.core_space import CoreSpace
from superpose_adapters.merge.density import check_density
from superpose_adapters.merge.method import Method
from superpose_adapters.merge.term import Pair, Term


@dataclass(frozen=True)
class CoreDare(Method):
    """The sum of the core matrices, of whose entries each stays with probability `density`.

    "Language Models are Super Mario" (arXiv 2311.03099); the paper drops p = 1 - density of a
    delta's entries, here those of its core. What stays is divided by the density, so that the mean
    over all seeds is the plain sum.

    Weights multiply deltas; a negative one takes a delta away. The order in which adapters are
    given changes nothing. Their digests do, and with them the gauge: the random numbers of an
    adapter are those of its place in the order of digests. Rank: at most sum(r_i).

    Attributes:
        density: Probability of an entry to stay, above 0 and at most 1; 1 is the plain sum.
        seed: 0 to 2**32 - 1. One seed gives the same result whatever else draws random numbers.
    """

    name: ClassVar[str] = "core-dare"

    density: float = 0.5
    seed: int = 0

    def __post_init__(self) -> None:
        """Check the options."""
        check_density(self.density)
        if not 0 <= self.seed < 2**32:
            raise ValueError(f"seed is {self.seed}: use 0 to 2**32 - 1")

    def merge(self, module: str, parts: int, terms: Sequence[Term]) -> Pair:
        """Drop, enlarge and add."""
        space = CoreSpace.of(terms)
        kept = [
            core * self._kept(module, term.part, core)
            for term, core in zip(terms, space.cores, strict=True)
        ]
        return space.pair(torch.stack(kept).sum(dim=0) / self.density)

    def _kept(self, module: str, part: int, core: Tensor) -> Tensor:
        """Return which entries of a core stay, of the shape of the core."""
        key = hashlib.sha256(f"{self.seed} {part} {module}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(key[:8]))
        return torch.rand(core.shape, generator=generator, dtype=core.dtype) < self.density

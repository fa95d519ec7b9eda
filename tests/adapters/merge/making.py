"""Terms and adapters to merge, drawn by a seed, and the deltas that they mean."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from tests.adapters.merge.dense import Matrix

from superpose_adapters.adapter import Adapter, Factors
from superpose_adapters.merge.merge import Part
from superpose_adapters.merge.method import Method
from superpose_adapters.merge.term import Term

MODULE = "transformer.h.0.attn.c_attn"


def make_terms(seed: int, ranks: Sequence[int], outputs: int = 14, inputs: int = 11) -> list[Term]:
    """Terms of generic deltas of about one size."""
    generator = torch.Generator().manual_seed(seed)

    def draw(rows: int, columns: int) -> torch.Tensor:
        return torch.randn(rows, columns, generator=generator, dtype=torch.float64)

    return [Term(i, draw(r, inputs), draw(outputs, r)) for i, r in enumerate(ranks)]


def weighted(terms: Sequence[Term], weights: Sequence[float]) -> list[Term]:
    return [Term(t.part, t.a, t.b * w, w) for t, w in zip(terms, weights, strict=True)]


def deltas_of(terms: Sequence[Term]) -> list[Matrix]:
    return [term.b.numpy() @ term.a.numpy() for term in terms]


def merged_delta(method: Method, terms: Sequence[Term], parts: int | None = None) -> Matrix:
    a, b = method.merge(MODULE, len(terms) if parts is None else parts, terms)
    assert a.dtype == b.dtype == torch.float64
    assert a.shape[0] == b.shape[1] <= sum(term.rank for term in terms)
    delta: Matrix = b.numpy() @ a.numpy()
    return delta


def make_part(
    domain: str,
    modules: Mapping[str, tuple[torch.Tensor, torch.Tensor]],
    weight: float = 1.0,
    scaling: float = 1.0,
) -> Part:
    """A part whose digest is its domain's, padded."""
    factors = {m: Factors(a.float(), b.float(), scaling) for m, (a, b) in sorted(modules.items())}
    return Part(domain, Adapter(digest=domain.ljust(64, "0"), modules=factors), weight)


def distance(found: Matrix, expected: Matrix) -> float:
    """Norm of the difference over the norm of what was expected, or over 1 where that is 0."""
    return float(np.linalg.norm(found - expected) / (np.linalg.norm(expected) or 1))

"""Merge adapters into one: every module by one method, from the factors in float64."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from superpose_adapters.adapter import Adapter
from superpose_adapters.merge.method import Method
from superpose_adapters.merge.term import Term


@dataclass(frozen=True)
class Part:
    """One adapter of a merge.

    Attributes:
        domain: What it is called.
        adapter: The adapter.
        weight: What its delta is multiplied by, not 0; negative to take it away.
    """

    domain: str
    adapter: Adapter
    weight: float


def merge(parts: Sequence[Part], method: Method) -> dict[str, tuple[Tensor, Tensor]]:
    """Return {module: (a (R, in), b (out, R))}, float32, sorted by module.

    What a module's pair means is b @ a: scaling and weights are multiplied in. Modules in which
    nothing is left have no pair.

    Args:
        parts: At least one. Their order is that of the fold (digest, weight, domain), whatever is
            given, so that a merge depends on what is merged alone.
        method: How.
    """
    ordered = in_order(parts)
    merged = {}
    for module in sorted({module for part in ordered for module in part.adapter.modules}):
        a, b = method.merge(module, len(ordered), terms_of(ordered, module))
        if len(a):
            merged[module] = (a.float(), b.float())
    return merged


def in_order(parts: Sequence[Part]) -> list[Part]:
    """Return the parts in the order of the fold, by which a term knows its part."""
    return sorted(parts, key=lambda part: (part.adapter.digest, part.weight, part.domain))


def terms_of(parts: Sequence[Part], module: str) -> list[Term]:
    """Return the weighted deltas of one module, of those parts that adapt it."""
    return [
        Term(i, factors.a.double(), factors.b.double() * (part.weight * factors.scaling))
        for i, part in enumerate(parts)
        if (factors := part.adapter.modules.get(module)) is not None
    ]

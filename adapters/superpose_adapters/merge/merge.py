"""Merge adapters into one: every module by one method, from the factors in float64."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from torch import Tensor

from superpose_adapters.adapter import Adapter
from superpose_adapters.merge.method import MergeError, Method
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
    """Return {module: (a (R, in), b (out, R))}, float32, sorted by module; see `merge_each`."""
    return dict(merge_each(parts, method))


def merge_each(
    parts: Sequence[Part], method: Method
) -> Iterator[tuple[str, tuple[Tensor, Tensor]]]:
    """Yield each module, in ascending order, with its a (R, in) and b (out, R), float32.

    What a module's pair means is b @ a: scaling and weights are multiplied in. Modules in which
    nothing is left have no pair. Whoever stops asking stops the merge.

    Args:
        parts: At least one. They are put `in_order`, so that a merge depends on what is merged
            alone.
        method: How.

    Raises:
        MergeError: A module has several shapes, what comes out is beyond float32, or the method
            cannot merge these adapters.
    """
    ordered = in_order(parts)
    for module in modules_of(ordered):
        a, b = (f.float() for f in method.merge(module, len(ordered), terms_of(ordered, module)))
        if not (a.isfinite().all() and b.isfinite().all()):
            raise MergeError(f"{module}: what is merged is beyond float32: use smaller weights")
        if a.any() and b.any():
            yield module, (a, b)


def in_order(parts: Sequence[Part]) -> list[Part]:
    """Return the parts in the order of the fold, by which a term knows its part."""
    return sorted(parts, key=lambda part: (part.adapter.digest, part.weight, part.domain))


def modules_of(parts: Sequence[Part]) -> list[str]:
    """Return the modules that any part adapts, sorted."""
    return sorted({module for part in parts for module in part.adapter.modules})


def terms_of(parts: Sequence[Part], module: str) -> list[Term]:
    """Return the weighted deltas of one module, of those parts that adapt it.

    Raises:
        MergeError: They are not of one shape.
    """
    terms: list[Term] = []
    domains: dict[tuple[int, int], str] = {}  # By (out, in).
    for i, part in enumerate(parts):
        factors = part.adapter.modules.get(module)
        if factors is not None:
            scale = part.weight * factors.scaling
            terms.append(Term(i, factors.a.double(), factors.b.double() * scale, scale))
            domains[factors.b.shape[0], factors.a.shape[1]] = part.domain
    if len(domains) > 1:
        shapes = " and ".join(f"{o} x {i} in {domain}" for (o, i), domain in domains.items())
        raise MergeError(f"{module} is {shapes}: merge adapters of one base")
    return terms

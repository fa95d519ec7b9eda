"""Geometry of deltas: how large they are, how far they overlap, what rounding loses of them.

All of it comes from the factors, in float64; a delta is formed only to measure a fold. With
D = s B A, the inner product of two deltas is <D1, D2> = s1 s2 sum((A1 A2^T) * (B1^T B2)), which
costs O((in + out) r^2) instead of the O(in out r) of forming them.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations

import torch
from torch import Tensor

from superpose_adapters.adapter import Adapter, Factors
from superpose_adapters.layout import Layout
from superpose_adapters.mix import BoundEntry, BoundMix

# Above this fold error a mix is served by correction (design, section 2).
MAX_FOLD_ERROR = 0.25
# Two domains overlap if the RMS cosine of their deltas is above both of these.
OVERLAP_COSINE = 0.1
OVERLAP_FLOORS = 10.0
# Share of energy that a sum gains or loses before `analyze` warns.
MAX_INTERFERENCE = 0.2
# Norm of the sum over the norm of the base parameters that it changes.
MAX_RELATIVE_SUM = 1.0

_CHUNK_ELEMENTS = 1 << 20
_EXPONENT_BITS = 0x7FF0_0000_0000_0000  # of a float64


def inner_product(first: Factors, second: Factors) -> float:
    """Return <D1, D2>, the sum of products of the elements of two deltas of one module."""
    over_inputs = first.a.double() @ second.a.double().T  # (r1, r2)
    over_outputs = first.b.double().T @ second.b.double()  # (r1, r2)
    return first.scaling * second.scaling * float((over_inputs * over_outputs).sum())


def gram(deltas: Sequence[Factors]) -> Tensor:
    """Return the inner products of the deltas of one module, float64 (n, n)."""
    ranks = torch.tensor([factors.rank for factors in deltas])
    scalings = torch.tensor([factors.scaling for factors in deltas], dtype=torch.float64)
    a = torch.cat([factors.a for factors in deltas]).double()  # (R, in)
    b = torch.cat([factors.b for factors in deltas], dim=1).double()  # (out, R)
    # (R, n): the scaling of delta j in the rows of its ranks, 0 elsewhere.
    owners = torch.diag(scalings).repeat_interleave(ranks, dim=0)
    products = owners.T @ ((a @ a.T) * (b.T @ b)) @ owners
    # Rounding can take the square of a norm that is nearly zero below it.
    products.diagonal().clamp_(min=0)
    return products


def grams(adapters: Sequence[Adapter]) -> dict[str, Tensor]:
    """Return {module: inner products of the adapters' deltas, (n, n)}, sorted by module.

    An adapter that leaves a module alone has zeros there. One adapter may be given twice.
    """
    result: dict[str, Tensor] = {}
    for module in sorted({module for adapter in adapters for module in adapter.modules}):
        present = [i for i, adapter in enumerate(adapters) if module in adapter.modules]
        products = torch.zeros(len(adapters), len(adapters), dtype=torch.float64)
        index = torch.tensor(present)
        products[index[:, None], index] = gram([adapters[i].modules[module] for i in present])
        result[module] = products
    return result


def delta_norm(adapter: Adapter) -> float:
    """Return the Frobenius norm of an adapter's deltas, over all its modules."""
    return mix_norm({adapter: 1.0})


def mix_norm(weights: Mapping[Adapter, float]) -> float:
    """Return the norm of the weighted sum of deltas, over all modules."""
    present = {adapter: weight for adapter, weight in weights.items() if weight != 0}
    values, largest = _scaled(list(present.values()))
    return largest * math.sqrt(sum(_energy(values, g) for g in grams(list(present)).values()))


def _scaled(weights: Sequence[float] | Tensor) -> tuple[Tensor, float]:
    """Return weights over the largest one, and that one: squares of tiny ones would vanish."""
    values = torch.as_tensor(weights, dtype=torch.float64)
    largest = float(values.abs().max()) if len(weights) else 0.0
    return (values / largest if largest > 0 else values), largest


def _energy(weights: Tensor, products: Tensor) -> float:
    """Return the squared norm of a module's weighted sum."""
    return max(0.0, float(weights @ products @ weights))


def module_type(module: str) -> str:
    """Return the part of a module's name after its layer number, such as `attn.c_attn`."""
    parts = module.split(".")
    numbers = [i for i, part in enumerate(parts) if part.isdecimal()]
    return ".".join(parts[numbers[-1] + 1 :]) if numbers else module


def rms(values: Iterable[float]) -> float:
    """Return the root of the mean square; 0 of nothing."""
    squares = [value * value for value in values]
    return math.sqrt(sum(squares) / len(squares)) if squares else 0.0


@dataclass(frozen=True)
class Overlap:
    """How far the deltas of two domains point the same way.

    Only modules in which both deltas are non-zero count: where one domain does nothing there is
    nothing to overlap with, and a zero would hide an overlap elsewhere. Weights play no part.

    Attributes:
        first: One domain.
        second: The other.
        cosines: {module: cosine}, -1 to 1.
        floors: {module: 1/sqrt(in x out)}, the RMS cosine of two random deltas.
    """

    first: str
    second: str
    cosines: Mapping[str, float]
    floors: Mapping[str, float]

    @property
    def rms(self) -> float:
        """RMS of the cosines over the shared modules; 0 if there are none."""
        return rms(self.cosines.values())

    @property
    def floor(self) -> float:
        """RMS of the random floors over the shared modules."""
        return rms(self.floors.values())

    @property
    def rms_by_type(self) -> dict[str, float]:
        """RMS of the cosines over the modules of each type."""
        by_type: dict[str, list[float]] = {}
        for module, cosine in self.cosines.items():
            by_type.setdefault(module_type(module), []).append(cosine)
        return {name: rms(cosines) for name, cosines in sorted(by_type.items())}


def overlap(first: str, a: Adapter, second: str, b: Adapter) -> Overlap:
    """Return the overlap of two named adapters."""
    return _overlap((first, 0, a), (second, 1, b), grams([a, b]))


def _overlap(
    first: tuple[str, int, Adapter],
    second: tuple[str, int, Adapter],
    products: Mapping[str, Tensor],
) -> Overlap:
    """Return the overlap of the adapters at two places (name, index, adapter) in `products`."""
    (name, i, adapter), (other, j, _) = first, second
    cosines: dict[str, float] = {}
    floors: dict[str, float] = {}
    for module, g in products.items():
        norms = math.sqrt(g[i, i]) * math.sqrt(g[j, j])
        if norms > 0:
            cosines[module] = min(1.0, max(-1.0, float(g[i, j]) / norms))
            factors = adapter.modules[module]
            floors[module] = 1 / math.sqrt(factors.a.shape[1] * factors.b.shape[0])
    return Overlap(name, other, cosines, floors)


@dataclass(frozen=True)
class Interference:
    """Energy that a weighted sum gains (above 0) or loses (below 0) because its terms overlap.

    Attributes:
        ratio: ||sum||^2 / sum ||term||^2 - 1 over all modules, weights included: 0 for orthogonal
            deltas, 1 for two equal ones, -1 for two that cancel.
        by_module: The same, module by module.
    """

    ratio: float
    by_module: Mapping[str, float]


def interference(terms: Sequence[tuple[Adapter, float]]) -> Interference:
    """Return the interference of a weighted sum; an adapter may be among its terms twice."""
    return _interference([weight for _, weight in terms], grams([adapter for adapter, _ in terms]))


def _interference(weights: Sequence[float], products: Mapping[str, Tensor]) -> Interference:
    values, _ = _scaled(weights)
    whole = {module: _energy(values, g) for module, g in products.items()}
    apart = {module: float(g.diagonal() @ values.square()) for module, g in products.items()}
    return Interference(
        ratio=_excess(sum(whole.values()), sum(apart.values())),
        by_module={module: _excess(whole[module], apart[module]) for module in products},
    )


def _excess(whole: float, apart: float) -> float:
    return whole / apart - 1 if apart > 0 else 0.0


def rounding_energy(parameter: Tensor) -> float:
    """Return the sum of ulp(w)^2 / 12 over a parameter's elements, in the parameter's own dtype.

    It is the expected squared norm of what rounding takes from a parameter with a small, arbitrary
    delta added: the error of an element is uniform over one ulp. Subnormals have the ulp of the
    smallest normal number.
    """
    info = torch.finfo(parameter.dtype)
    total = 0.0
    flat = parameter.detach().reshape(-1)
    for start in range(0, flat.numel(), _CHUNK_ELEMENTS):
        exact = flat[start : start + _CHUNK_ELEMENTS].double()
        # A float64 without its mantissa is the power of two at or below it.
        powers = (exact.view(torch.int64) & _EXPONENT_BITS).view(torch.float64)
        ulps = powers.clamp_min(info.smallest_normal) * info.eps
        total += float(ulps.square().sum())
    return total / 12


def expected_fold_error(rounding: Mapping[str, float], norm: float) -> float:
    """Estimate the fold error, 0 to 1, from `rounding_energy` per folded module.

    Args:
        rounding: {module: rounding energy} of the modules that the mix adapts, and no others.
        norm: Norm of the mix's delta over these modules, see `mix_norm`. 0 loses nothing.

    The estimate holds while the delta is above the rounding; far below it, all is lost, which is
    an error of 1.
    """
    if norm <= 0:
        return 0.0
    return min(1.0, math.sqrt(sum(rounding.values())) / norm)


def fold_error(
    base: Mapping[str, Tensor],
    folded: Mapping[str, Tensor],
    weights: Mapping[Adapter, float],
    layout: Layout,
) -> float:
    """Measure the fold error: norm(W(mix) - W0 - delta) / norm(delta), in float64.

    Args:
        base: {module: W0} for every module that the mix adapts; others may be absent.
        folded: {module: W(mix)} for the same modules.
        weights: The mix that was folded.
        layout: The base's modules.

    Returns:
        0 if nothing is lost; 0 too if the delta is zero and nothing changed.
    """
    lost: list[float] = []
    total: list[float] = []
    for module in sorted({module for adapter in weights for module in adapter.modules}):
        delta = torch.zeros(base[module].shape, dtype=torch.float64, device=base[module].device)
        for adapter, weight in weights.items():
            if module in adapter.modules:
                factors = adapter.modules[module]
                a, b = (f.to(delta.device, torch.float64) for f in (factors.a, factors.b))
                delta += layout[module].delta(b @ a) * (weight * factors.scaling)
        error = folded[module].double() - base[module].double() - delta
        lost.append(_norm(error))
        total.append(_norm(delta))
    if not any(total):
        return math.inf if any(lost) else 0.0
    return math.hypot(*lost) / math.hypot(*total)


def _norm(values: Tensor) -> float:
    scaled, largest = _scaled(values.reshape(-1))
    return largest * float(scaled.norm())


@dataclass(frozen=True)
class DomainSize:
    """How large one domain's delta is.

    Attributes:
        domain: Its name.
        weight: Its weight in the mix; the norms below leave it out.
        norm: Norm of the delta over all its modules.
        relative: That norm over the norm of the base parameters of these modules.
        relative_by_module: The same, module by module.
    """

    domain: str
    weight: float
    norm: float
    relative: float
    relative_by_module: Mapping[str, float]


@dataclass(frozen=True)
class Analysis:
    """What a mix would do, found without doing it.

    Attributes:
        sizes: One entry a domain, in the order of the mix.
        overlaps: One entry a pair of domains.
        interference: Of the weighted sum.
        norm: Norm of the weighted sum.
        fold_error: Expected fold error in the parameters' dtype.
        warnings: What an operator should know, one sentence each.
    """

    sizes: tuple[DomainSize, ...]
    overlaps: tuple[Overlap, ...]
    interference: Interference
    norm: float
    fold_error: float
    warnings: tuple[str, ...]


def analyze(
    mix: BoundMix, base_norms: Mapping[str, float], rounding: Mapping[str, float]
) -> Analysis:
    """Analyse a bound mix.

    Args:
        mix: May name one adapter twice, under two domains.
        base_norms: {module: norm of the base parameter} of every module that the mix adapts.
        rounding: {module: `rounding_energy` of the base parameter} of the same modules.
    """
    entries = sorted(mix.entries, key=lambda entry: entry.domain)
    products = grams([entry.adapter for entry in entries])
    places = [(entry.domain, i, entry.adapter) for i, entry in enumerate(entries)]
    sizes = tuple(
        _size(entry, {m: math.sqrt(products[m][i, i]) for m in entry.adapter.modules}, base_norms)
        for i, entry in enumerate(entries)
    )
    overlaps = tuple(_overlap(*pair, products) for pair in combinations(places, 2))
    gained = _interference([entry.weight for entry in entries], products)
    norm = mix_norm(mix.weights)
    relative = _share(norm, math.hypot(*(base_norms[m] for m in products))) if products else 0.0
    lost = expected_fold_error({module: rounding[module] for module in products}, norm)
    alone = {
        entry.domain: expected_fold_error(
            {m: rounding[m] for m in entry.adapter.modules}, abs(entry.weight) * size.norm
        )
        for entry, size in zip(entries, sizes, strict=True)
    }
    return Analysis(
        sizes,
        overlaps,
        gained,
        norm,
        lost,
        tuple(_warnings(overlaps, gained, relative, lost, alone)),
    )


def _size(
    entry: BoundEntry, norms: Mapping[str, float], base_norms: Mapping[str, float]
) -> DomainSize:
    norm = math.hypot(*norms.values())
    return DomainSize(
        domain=entry.domain,
        weight=entry.weight,
        norm=norm,
        relative=_share(norm, math.hypot(*(base_norms[module] for module in norms))),
        relative_by_module={m: _share(value, base_norms[m]) for m, value in norms.items()},
    )


def _share(norm: float, of: float) -> float:
    return norm / of if of > 0 else math.inf


def _warnings(
    overlaps: Iterable[Overlap],
    gained: Interference,
    relative: float,
    lost: float,
    alone: Mapping[str, float],
) -> Iterable[str]:
    for pair in overlaps:
        if pair.rms > max(OVERLAP_COSINE, OVERLAP_FLOORS * pair.floor):
            yield (
                f"{pair.first} and {pair.second} overlap: RMS cosine {pair.rms:.3f}, "
                f"{pair.rms / pair.floor:.0f} times that of random deltas"
            )
    if abs(gained.ratio) > MAX_INTERFERENCE:
        verb = "reinforce" if gained.ratio > 0 else "cancel"
        yield (
            f"the deltas {verb} each other: the sum has {gained.ratio:+.0%} of the energy that "
            "they have apart"
        )
    if relative > MAX_RELATIVE_SUM:
        yield (
            f"the sum is {relative:.1f} times as large as the base parameters that it changes: "
            "smaller weights may serve every domain better"
        )
    if lost > MAX_FOLD_ERROR:
        yield (
            f"rounding would lose {lost:.0%} of the sum: this mix is served by correction, not "
            "folded"
        )
    for domain, error in alone.items():
        if error > MAX_FOLD_ERROR:
            yield (
                f"the delta of {domain} is small against rounding, which would lose {error:.0%} of "
                "it if it were folded alone"
            )

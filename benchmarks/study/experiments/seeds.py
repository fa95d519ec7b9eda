"""Seed x domain grid: what of the cosine comes from the domain, and what from a shared A."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import numpy as np

from benchmarks.report import Cell, Table
from benchmarks.study.cells import change_cell, interval_cell, mean_cell
from benchmarks.study.document import Claim, Picture, Plain, Section
from benchmarks.study.palette import ACCENT, FOURTH, INK, THIRD
from benchmarks.study.results import PairGeometry, Results
from benchmarks.study.statistics import Interval, jackknife, mean_if_known, percent
from benchmarks.study.study import AdapterSpec, Needs, Pair, Study
from benchmarks.study.ticks import plain_log
from benchmarks.study.verdict import at_least, at_most
from superpose_adapters.geometry import module_type

# A twin's rows, order and dropout follow from a seed that no other adapter has.
_TWIN = 100


def grid(study: Study) -> dict[tuple[str, int], AdapterSpec]:
    """Return {(domain, seed of its A): adapter}, of all shared seeds and of separate A's."""
    specs = [
        study.fundamental(domain, seed)
        for domain in study.config.domains
        for seed in study.config.seeds.shared
    ]
    specs += [s for seed in study.config.seeds.separate for s in study.separate(seed).values()]
    return {(spec.domains[0], spec.init_seed): spec for spec in specs}


def twin(study: Study, domain: str, seed: int) -> AdapterSpec:
    """Return the adapter that starts from a seed's A, with rows, order and dropout of its own."""
    return study.fundamental(domain, _TWIN + seed, init_seed=seed)


def needs(study: Study) -> Needs:
    """Ask for the cosines of all pairs of the grid, and of every adapter with its twin."""
    wanted = Needs()
    adapters = grid(study)
    wanted.cosines(adapters.values())
    for (domain, seed), spec in adapters.items():
        if seed in study.config.seeds.twins:
            wanted.cosines([spec, twin(study, domain, seed)])
    return wanted


@dataclass(frozen=True)
class Group:
    """Pairs of adapters that are related in one way."""

    name: str
    color: str
    pairs: tuple[Pair, ...]


SAME_A = "different domains, same A"
DIFFERENT_A = "different domains, different A"
CEILING = "same domain, different A (the ceiling)"
TWIN_CEILING = "same domain, same A (the ceiling with a shared A)"


def groups(study: Study) -> list[Group]:
    """Return all pairs of the grid by how they are related."""
    same_a: list[Pair] = []
    different_a: list[Pair] = []
    ceiling: list[Pair] = []
    for ((d1, s1), first), ((d2, s2), second) in combinations(grid(study).items(), 2):
        pairs = same_a if s1 == s2 else ceiling if d1 == d2 else different_a
        pairs.append((first, second))
    twins = [
        (spec, twin(study, domain, seed))
        for (domain, seed), spec in grid(study).items()
        if seed in study.config.seeds.twins
    ]
    return [
        Group(DIFFERENT_A, INK, tuple(different_a)),
        Group(CEILING, THIRD, tuple(ceiling)),
        Group(SAME_A, ACCENT, tuple(same_a)),
        Group(TWIN_CEILING, FOURTH, tuple(twins)),
    ]


def known(results: Results, pairs: Iterable[Pair]) -> list[PairGeometry]:
    """Return the geometry of those pairs that are measured."""
    return [found for pair in pairs if (found := results.pair(pair))]


Measured = list[tuple[frozenset[int], PairGeometry]]
"""Pairs with the seeds that they touch."""


def measured(results: Results, pairs: Iterable[Pair]) -> Measured:
    """Return those pairs that are measured; a seed is what fixes the first A."""
    return [
        (frozenset(spec.init_seed for spec in pair), found)
        for pair in pairs
        if (found := results.pair(pair))
    ]


def all_measured(results: Results, pairs: Sequence[Pair]) -> Measured:
    """Return all pairs, or none if any is not measured: a part of them decides nothing."""
    found = measured(results, pairs)
    return found if len(found) == len(pairs) else []


def mean_rms(pairs: Measured, seeds: frozenset[int]) -> float | None:
    """Return the mean RMS cosine of the pairs that touch these seeds only."""
    values = [geometry.rms for touched, geometry in pairs if touched <= seeds]
    return float(np.mean(values)) if values else None


def rms_interval(pairs: Measured) -> Interval | None:
    """Return the mean RMS cosine; the seed is the unit, for pairs share adapters."""
    seeds = frozenset().union(*(touched for touched, _ in pairs))
    return jackknife(seeds, lambda kept: mean_rms(pairs, kept))


def rms_change(first: Measured, second: Measured) -> Interval | None:
    """Return by how many per cent the mean RMS cosine changes from `first` to `second`."""

    def log_ratio(kept: frozenset[int]) -> float | None:
        before, after = mean_rms(first, kept), mean_rms(second, kept)
        return math.log(after / before) if before and after else None

    seeds = frozenset().union(*(touched for touched, _ in (*first, *second)))
    found = jackknife(seeds, log_ratio)
    return found.through(percent) if found else None


@dataclass(frozen=True)
class Bounds:
    """What a cosine is to be compared with; None where it is not known.

    Attributes:
        floor: RMS of random deltas, each with an A of its own.
        shared_floor: The same with one A.
        ceiling: RMS of one domain trained twice, from different A.
        twin_ceiling: The same from one A.
    """

    floor: float | None
    shared_floor: float | None
    ceiling: float | None
    twin_ceiling: float | None


def cosine_bounds(study: Study, results: Results) -> Bounds:
    """Return floors and ceilings; a ceiling is the mean of the pairs that are known."""
    by_name = {group.name: known(results, group.pairs) for group in groups(study)}
    apart = [*by_name[DIFFERENT_A], *by_name[CEILING]]
    together = [*by_name[SAME_A], *by_name[TWIN_CEILING]]

    def mean(found: list[PairGeometry]) -> float | None:
        return mean_if_known(geometry.rms for geometry in found)

    return Bounds(
        apart[0].floor if apart else None,
        together[0].floor if together else None,
        mean(by_name[CEILING]),
        mean(by_name[TWIN_CEILING]),
    )


def mark_bounds(axes: Any, bounds: Bounds, *, across: bool = False) -> None:
    """Draw both floors (dotted) and ceilings (dashed), in the colours of same and different A.

    Args:
        axes: Of matplotlib.
        bounds: What is not known is not drawn.
        across: The cosine is on the y axis.
    """
    draw = axes.axhline if across else axes.axvline
    for value, color, style, label in (
        (bounds.shared_floor, ACCENT, ":", "floor, same A"),
        (bounds.twin_ceiling, ACCENT, "--", "ceiling, same A"),
        (bounds.floor, INK, ":", "floor, different A"),
        (bounds.ceiling, INK, "--", "ceiling, different A"),
    ):
        if value:
            draw(value, color=color, ls=style, lw=1, alpha=0.8, label=label)


def section(study: Study, results: Results) -> Section:
    """Tell what of the cosine comes from the domain, and what from the A."""
    found = Section("seeds", "Cosines: seeds and domains")
    count, separate = len(study.config.seeds.shared), study.config.seeds.separate
    found.text = [
        f"{len(study.config.domains)} domains x {count} seeds; a seed fixes the first A, the "
        "sample of rows and their order. "
        + (
            f"Besides, {len(separate)} x {len(study.config.domains)} adapters, each from an A of "
            "its own. "
            if separate
            else ""
        )
        + "A cosine says something about two domains only by where "
        "it lies between floor and ceiling. The floor is the RMS cosine of random deltas: "
        "1/sqrt(in x out) if each has its own A, about 1/sqrt(rank x out) if both have one A that "
        "training has not moved. The ceiling is what two trainings on one domain reach. "
        + _repeated_rows(study),
        "Pairs share adapters, so the unit of the intervals is the seed of the A (n = "
        f"{count + len(separate) * len(study.config.domains)}; of pairs from one A {count}, of "
        f"twins {len(study.config.seeds.twins)}): they are left out one by one, each with all "
        "pairs that touch it, with Student's t. Pairs across two seeds have no interval below "
        "three seeds.",
    ]
    rows: list[list[Cell]] = []
    bounds = cosine_bounds(study, results)
    for group in groups(study):
        pairs = measured(results, group.pairs)
        if not pairs:
            continue
        geometry = [each for _, each in pairs]
        values = [g.rms for g in geometry]
        mean = float(np.mean(values))
        same_a = group.name in (SAME_A, TWIN_CEILING)
        ceiling = bounds.twin_ceiling if same_a else bounds.ceiling
        floor = geometry[0].floor
        rows.append(
            [
                group.name,
                len(values)
                if len(values) == len(group.pairs)
                else f"{len(values)} of {len(group.pairs)}",
                interval_cell(rms_interval(pairs)),
                f"{min(values):.4f} to {max(values):.4f}",
                floor,
                mean / floor,
                mean / ceiling if ceiling else None,
                mean_cell(g.weighted_rms for g in geometry),
                mean_cell(g.weighted for g in geometry),
            ]
        )
    found.tables.append(
        Table(
            "RMS cosine by relation",
            [
                "two adapters of",
                "pairs",
                "RMS cosine, mean [95 %, over seeds]",
                "range",
                "floor",
                "times the floor",
                "share of its ceiling",
                "RMS, weighted by norms",
                "cosine of the whole deltas",
            ],
            rows,
        )
    )
    found.tables += [_by_pair(study, results, bounds), _by_type(study, results)]
    if rows:
        found.pictures = [
            Picture(
                "grid",
                "RMS cosine of every pair of the grid, by relation. The bar is the mean. Dotted: "
                "floors (random deltas); dashed: ceilings (one domain trained twice).",
                lambda figure: _strips(figure, study, results),
                (8.5, 4.0),
            )
        ]
    found.claims = _claims(study, results)
    return found


def _repeated_rows(study: Study) -> str:
    """Return how far the rows of two trainings on one domain are the same."""
    shares = {}
    for domain in study.config.domains:
        there = study.inputs.files[domain].rows["train"]
        shares[domain] = study.rows(domain) / there
    if all(share >= 1 for share in shares.values()):
        return "Both see all training rows, in another order."
    return (
        "Rows are sampled anew for each and may be the same: of those of one training, on average "
        + ", ".join(f"{100 * share:.0f} % ({domain})" for domain, share in shares.items())
        + " are among those of another."
    )


def _by_pair(study: Study, results: Results, bounds: Bounds) -> Table:
    """Return the RMS of each pair of domains, with and without a shared A."""
    rows: list[list[Cell]] = []
    by_name = {group.name: group for group in groups(study)}
    for pair in study.pairs:
        cells: list[Cell] = [" + ".join(pair)]
        for name, floor, ceiling in (
            (SAME_A, bounds.shared_floor, bounds.twin_ceiling),
            (DIFFERENT_A, bounds.floor, bounds.ceiling),
        ):
            of = [p for p in by_name[name].pairs if {d for s in p for d in s.domains} == set(pair)]
            there = [results.pair(p) for p in of]
            value = mean_if_known(g.rms for g in there if g)
            cells += [
                mean_cell(g.rms if g else None for g in there),
                value / ceiling if value and ceiling else None,
                floor,
            ]
        rows.append(cells)
    return Table(
        "RMS cosine by pair of domains, mean over seeds",
        [
            "pair",
            "same A",
            "of its ceiling",
            "its floor",
            "different A",
            "of its ceiling",
            "its floor",
        ],
        rows,
    )


def _by_type(study: Study, results: Results) -> Table:
    """Return each module type's RMS, and its share of the sum of squared cosines."""
    rows: list[list[Cell]] = []
    for group in groups(study):
        found = known(results, group.pairs)
        weighted = weighted_by_type(found)
        rows += [
            [
                group.name,
                name,
                value,
                found[0].floor_by_type[name],
                f"{100 * share:.0f} %",
                weighted[name],
            ]
            for name, (value, share) in type_shares(found).items()
        ]
    return Table(
        "RMS cosine by module type",
        [
            "two adapters of",
            "module type",
            "RMS cosine",
            "floor",
            "share of the sum of squares",
            "RMS, weighted by norms",
        ],
        rows,
    )


def weighted_by_type(found: Iterable[PairGeometry]) -> dict[str, float]:
    """Return {module type: RMS}, every module of every pair by the product of its two norms."""
    sums: dict[str, tuple[float, float]] = {}
    for geometry in found:
        for module, cosine in geometry.cosines.items():
            weight = math.prod(geometry.products[module][1:])
            squares, weights = sums.get(module_type(module), (0.0, 0.0))
            sums[module_type(module)] = (squares + weight * cosine**2, weights + weight)
    return {name: math.sqrt(squares / weights) for name, (squares, weights) in sums.items()}


def type_shares(found: Iterable[PairGeometry]) -> dict[str, tuple[float, float]]:
    """Return {module type: (RMS, share of the sum of squares)} over pairs."""
    squares: dict[str, list[float]] = {}
    for geometry in found:
        for module, cosine in geometry.cosines.items():
            squares.setdefault(module_type(module), []).append(cosine**2)
    whole = sum(sum(values) for values in squares.values())
    return {
        name: (math.sqrt(np.mean(values)), sum(values) / whole if whole else 0.0)
        for name, values in sorted(squares.items())
    }


def _strips(figure: Any, study: Study, results: Results) -> None:
    axes = figure.subplots()
    scatter = np.random.default_rng(0)
    shown = [group for group in groups(study) if known(results, group.pairs)]
    mark_bounds(axes, cosine_bounds(study, results))
    for at, group in enumerate(shown):
        values = [g.rms for g in known(results, group.pairs)]
        y = at + scatter.uniform(-0.18, 0.18, len(values))
        axes.scatter(values, y, s=12, color=group.color, alpha=0.6, linewidths=0)
        axes.plot([np.mean(values)] * 2, [at - 0.32, at + 0.32], color=group.color, lw=2.5)
        axes.annotate(
            f"{np.mean(values):.3f}",
            (np.mean(values), at + 0.34),
            ha="center",
            va="bottom",
            fontsize=8,
            color=group.color,
        )
    axes.set_yticks(range(len(shown)), [g.name.replace(" (", "\n(") for g in shown], fontsize=8)
    axes.set(xscale="log", xlabel="RMS cosine over the modules", ylim=(-0.6, len(shown) - 0.3))
    plain_log(axes.xaxis)
    figure.legend(
        *axes.get_legend_handles_labels(), loc="outside lower center", ncols=4, fontsize=7
    )


def _claims(study: Study, results: Results) -> list[Claim]:
    by_name = {group.name: all_measured(results, group.pairs) for group in groups(study)}
    same, different, ceiling = by_name[SAME_A], by_name[DIFFERENT_A], by_name[CEILING]
    fall = rms_change(same, different) if same and different else None
    apart = rms_change(ceiling, different) if ceiling and different else None
    shares = type_shares(geometry for _, geometry in same)
    largest = max(shares, key=lambda name: shares[name][1]) if shares else ""

    def share(kept: frozenset[int]) -> float | None:
        there = [geometry for touched, geometry in same if touched <= kept]
        return type_shares(there)[largest][1] if there else None

    carried = jackknife({s for touched, _ in same for s in touched}, share, limits=(0.0, 1.0))
    return [
        Claim(
            "Most of the cosine of two domains comes from a shared A: with different A it is at "
            "least 50 % smaller.",
            at_most(fall, -50),
            change_cell(fall) or "",
            Plain(
                "most of the overlap of two adapters comes from having started from one A",
                "Most of the overlap (RMS cosine) of two adapters comes from having started from "
                "one A, not from their domains.",
                "Less than half of the overlap (RMS cosine) of two adapters comes from having "
                "started from one A.",
            ),
        ),
        Claim(
            "From different A, two domains lie below the ceiling by at least 10 %: the cosine does "
            "tell domains apart.",
            at_most(apart, -10),
            change_cell(apart) or "",
        ),
        Claim(
            "One module type carries at least 80 % of the sum of squared cosines (96 % in the "
            "paper's tables, by mlp.c_proj).",
            at_least(carried, 0.8),
            f"{largest}: {interval_cell(carried, 2)} of it (shared A)" if carried else "",
        ),
    ]

"""Seed x domain grid: what of the cosine comes from the domain, and what from a shared A."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import numpy as np

from benchmarks.report import Cell, Table
from benchmarks.study.cells import mean_cell
from benchmarks.study.document import Claim, Picture, Section
from benchmarks.study.palette import ACCENT, FOURTH, GRAY, INK, THIRD
from benchmarks.study.results import PairGeometry, Results
from benchmarks.study.statistics import mean_interval
from benchmarks.study.study import AdapterSpec, Needs, Pair, Study
from benchmarks.study.ticks import plain_log

# A twin's rows, order and dropout follow from a seed that no other adapter has.
_TWIN = 100


def grid(study: Study) -> dict[tuple[str, int], AdapterSpec]:
    """Return {(domain, seed): adapter} of all shared seeds."""
    return {
        (domain, seed): study.fundamental(domain, seed)
        for domain in study.config.domains
        for seed in study.config.seeds.shared
    }


def twin(study: Study, domain: str, seed: int) -> AdapterSpec:
    """Return the adapter that starts from a seed's A but sees other rows in another order."""
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
TWIN_CEILING = "same domain, same A, other rows (the ceiling with a shared A)"


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


@dataclass(frozen=True)
class Bounds:
    """What a cosine is to be compared with; None where it is not known.

    Attributes:
        floor: RMS of random deltas.
        ceiling: RMS of one domain trained twice, from different A.
        twin_ceiling: The same from one A.
    """

    floor: float | None
    ceiling: float | None
    twin_ceiling: float | None


def cosine_bounds(study: Study, results: Results) -> Bounds:
    """Return floor and ceilings."""
    by_name = {group.name: known(results, group.pairs) for group in groups(study)}
    every = [geometry for found in by_name.values() for geometry in found]
    return Bounds(
        every[0].floor if every else None,
        mean_cell(g.rms for g in by_name[CEILING]),
        mean_cell(g.rms for g in by_name[TWIN_CEILING]),
    )


def section(study: Study, results: Results) -> Section:
    """Tell what of the cosine comes from the domain, and what from the A."""
    bounds = cosine_bounds(study, results)
    found = Section("seeds", "Cosines: seeds and domains")
    found.text = [
        f"{len(study.config.domains)} domains x {len(study.config.seeds.shared)} seeds; a seed "
        "fixes the first A, the sample of rows and their order. The floor is the RMS cosine of "
        "random deltas, 1/sqrt(in x out); the ceiling is what two trainings on one domain reach. A "
        "cosine says something about two domains only by where it lies between the two.",
    ]
    rows: list[list[Cell]] = []
    for group in groups(study):
        geometry = known(results, group.pairs)
        if not geometry:
            continue
        values = [g.rms for g in geometry]
        interval = mean_interval(values, results.resamples)
        same_a = group.name in (SAME_A, TWIN_CEILING)
        ceiling = bounds.twin_ceiling if same_a else bounds.ceiling
        rows.append(
            [
                group.name,
                len(values),
                f"{interval.value:.4f} [{interval.low:.4f}, {interval.high:.4f}]",
                f"{min(values):.4f} to {max(values):.4f}",
                interval.value / bounds.floor if bounds.floor else None,
                interval.value / ceiling if ceiling else None,
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
                "RMS cosine, mean [95 %]",
                "range",
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
                "RMS cosine of every pair of the grid, by relation. Dotted: the floor. The bar is "
                "the mean.",
                lambda figure: _strips(figure, study, results),
                (8.5, 3.6),
            )
        ]
    found.claims = _claims(study, results)
    return found


def _by_pair(study: Study, results: Results, bounds: Bounds) -> Table:
    """Return the RMS of each pair of domains, with and without a shared A."""
    rows: list[list[Cell]] = []
    for pair in study.pairs:
        cells: list[Cell] = [" + ".join(pair)]
        for name, ceiling in ((SAME_A, bounds.twin_ceiling), (DIFFERENT_A, bounds.ceiling)):
            (group,) = (each for each in groups(study) if each.name == name)
            of = [p for p in group.pairs if {d for s in p for d in s.domains} == set(pair)]
            value = mean_cell(g.rms for g in known(results, of))
            cells += [value, value / ceiling if value and ceiling else None]
        rows.append([*cells, bounds.floor])
    return Table(
        "RMS cosine by pair of domains, mean over seeds",
        ["pair", "same A", "of its ceiling", "different A", "of its ceiling", "floor"],
        rows,
    )


def _by_type(study: Study, results: Results) -> Table:
    """Return each module type's RMS, and its share of the sum of squared cosines."""
    rows: list[list[Cell]] = []
    for group in groups(study):
        shares = type_shares(known(results, group.pairs))
        rows += [
            [group.name, name, value, f"{100 * share:.0f} %"]
            for name, (value, share) in shares.items()
        ]
    return Table(
        "RMS cosine by module type",
        ["two adapters of", "module type", "RMS cosine", "share of the sum of squares"],
        rows,
    )


def type_shares(found: Iterable[PairGeometry]) -> dict[str, tuple[float, float]]:
    """Return {module type: (RMS, share of the sum of squares)} over pairs."""
    squares: dict[str, list[float]] = {}
    for geometry in found:
        for name, value in geometry.rms_by_type.items():
            squares.setdefault(name, []).append(value**2)
    means = {name: float(np.mean(values)) for name, values in squares.items()}
    whole = sum(means.values())
    return {n: (math.sqrt(value), value / whole) for n, value in sorted(means.items())}


def _strips(figure: Any, study: Study, results: Results) -> None:
    axes = figure.subplots()
    scatter = np.random.default_rng(0)
    shown = [group for group in groups(study) if known(results, group.pairs)]
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
    bounds = cosine_bounds(study, results)
    if bounds.floor:
        axes.axvline(bounds.floor, color=GRAY, ls=":", lw=1.2)
        axes.annotate(
            "floor",
            (bounds.floor, -0.45),
            color=GRAY,
            fontsize=8,
            ha="left",
            textcoords="offset points",
            xytext=(4, 0),
        )
    axes.set_yticks(range(len(shown)), [g.name.replace(" (", "\n(") for g in shown], fontsize=8)
    axes.set(xscale="log", xlabel="RMS cosine over the modules", ylim=(-0.6, len(shown) - 0.3))
    plain_log(axes.xaxis)


def _claims(study: Study, results: Results) -> list[Claim]:
    mean = {
        group.name: mean_cell(g.rms for g in known(results, group.pairs)) for group in groups(study)
    }
    same, different, ceiling = mean[SAME_A], mean[DIFFERENT_A], mean[CEILING]
    enough = len(study.config.seeds.shared) > 1 and None not in (same, different, ceiling)
    (group,) = (each for each in groups(study) if each.name == SAME_A)
    shares = type_shares(known(results, group.pairs))
    largest = max(shares.items(), key=lambda each: each[1][1]) if shares else None
    return [
        Claim(
            "Most of the cosine of two domains comes from a shared A: with different A it is less "
            "than half.",
            different < same / 2 if enough and same and different else None,
            f"same A {same:.4f}, different A {different:.4f}" if same and different else "",
        ),
        Claim(
            "From different A, two domains lie below the ceiling by at least a tenth: the cosine "
            "does tell domains apart.",
            different < 0.9 * ceiling if enough and different and ceiling else None,
            f"two domains {different:.4f}, one domain twice {ceiling:.4f}"
            if different and ceiling
            else "",
        ),
        Claim(
            "One module type carries at least 80 % of the sum of squared cosines (96 % in the "
            "paper's tables, by mlp.c_proj).",
            largest[1][1] >= 0.8 if largest else None,
            f"{largest[0]}: {100 * largest[1][1]:.0f} % (shared A)" if largest else "",
        ),
    ]

"""Orthogonality by construction: a frozen A from disjoint blocks makes every cosine 0."""

from __future__ import annotations

from itertools import combinations

from benchmarks.report import Cell, Table
from benchmarks.study.cells import change_cell, mean_cell, perplexity_cell
from benchmarks.study.document import Claim, Section
from benchmarks.study.results import Results
from benchmarks.study.statistics import Losses
from benchmarks.study.study import AdapterSpec, Needs, Study, total

# What is 0 but for rounding.
_ZERO_COSINE = 1e-6


def adapters(study: Study, seed: int) -> dict[str, AdapterSpec]:
    """Return the fundamental adapters, A frozen, each with a block of its own."""
    domains = study.config.domains
    return {
        domain: study.fundamental(domain, seed, block=(i, len(domains)))
        for i, domain in enumerate(domains, start=1)
    }


def needs(study: Study) -> Needs:
    """Ask for single adapters, pairs and the triple, and for their cosines."""
    wanted = Needs()
    config = study.config.orthogonal
    for seed in config.seeds if config else ():
        specs = adapters(study, seed)
        for domain, spec in specs.items():
            wanted.score(total(spec), study.scored([domain]))
        for union in study.unions:
            wanted.score(total(*(specs[domain] for domain in union)), study.scored(union))
        wanted.cosines(specs.values())
    return wanted


def kinds(study: Study) -> dict[str, list[dict[str, AdapterSpec]]]:
    """Return {kind of A: fundamental adapters, one set a seed}."""
    config = study.config.orthogonal
    seeds = config.seeds if config else ()
    found = {
        "shared A": [dict(a.fundamental) for a in study.arms if a.shared and a.seed in seeds],
        "different A": [dict(a.fundamental) for a in study.arms if not a.shared][: len(seeds)],
        "frozen disjoint A": [adapters(study, seed) for seed in seeds],
    }
    return {name: sets for name, sets in found.items() if sets}


def section(study: Study, results: Results) -> Section:
    """Tell whether interference stays where the cosine is 0."""
    found = Section("orthogonal", "Orthogonal by construction")
    found.text = [
        "With A frozen and taken from disjoint blocks of orthogonal rows, A1 A2^T = 0, so the "
        "cosine of two deltas is 0 in every module whatever is trained. If overlap of deltas were "
        "what makes sums lose, these would lose nothing. Interference: perplexity of the sum at "
        "weight 1 over that of the oracle router of the same adapters.",
    ]
    rows: list[list[Cell]] = []
    changes = {}
    for union in study.unions:
        for name, sets in kinds(study).items():
            routers = [results.router({d: specs[d] for d in union}) for specs in sets]
            sums: list[Losses | None] = [
                results.union(total(*(specs[d] for d in union)), study.scored(union))
                for specs in sets
            ]
            changes[union, name] = results.change(zip(routers, sums, strict=True))
            rows.append(
                [
                    " + ".join(union),
                    name,
                    _cosine(results, sets, union),
                    perplexity_cell(routers),
                    perplexity_cell(sums),
                    change_cell(changes[union, name]),
                ]
            )
    found.tables = [
        Table(
            "Interference by kind of A",
            ["sum", "A", "RMS cosine", "perplexity, oracle router", "sum", "interference"],
            rows,
        )
    ]
    largest = largest_cosine(study, results)
    triple = changes.get((study.config.domains, "frozen disjoint A"))
    found.claims = [
        Claim(
            f"Frozen disjoint A makes every module's cosine 0 (below {_ZERO_COSINE:.0e}).",
            largest < _ZERO_COSINE if largest is not None else None,
            f"largest {largest:.1e}" if largest is not None else "",
        ),
        Claim(
            "Interference stays without any overlap of deltas: the sum of three is at least 5 % "
            "worse than the oracle router (lower end of the interval).",
            triple.low >= 5 if triple else None,
            change_cell(triple) or "",
        ),
    ]
    return found


def _cosine(
    results: Results, sets: list[dict[str, AdapterSpec]], union: tuple[str, ...]
) -> float | str | None:
    found = [
        results.pair(pair) for specs in sets for pair in combinations([specs[d] for d in union], 2)
    ]
    mean = mean_cell(each.rms if each else None for each in found)
    # What is 0 but for rounding would be a long row of zeros.
    return f"{mean:.1e}" if mean is not None and mean < _ZERO_COSINE else mean


def largest_cosine(study: Study, results: Results) -> float | None:
    """Return the largest absolute cosine of any module of adapters with frozen disjoint A."""
    config = study.config.orthogonal
    values = [
        abs(cosine)
        for seed in (config.seeds if config else ())
        for pair in combinations(adapters(study, seed).values(), 2)
        if (geometry := results.pair(pair))
        for cosine in geometry.cosines.values()
    ]
    return max(values) if values else None

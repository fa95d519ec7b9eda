"""Orthogonality by construction: a frozen A from disjoint blocks makes every cosine 0."""

from __future__ import annotations

from itertools import combinations

from benchmarks.report import Cell, Table
from benchmarks.study.cells import change_cell, covered, mean_cell, perplexity_cell
from benchmarks.study.document import Claim, Plain, Section
from benchmarks.study.results import Results
from benchmarks.study.statistics import Losses
from benchmarks.study.study import AdapterSpec, Needs, Pair, Study, total
from benchmarks.study.verdict import at_least, exactly

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
    """Ask for single adapters, pairs and the triple, and for their cosines, of every kind."""
    wanted = Needs()
    for specs in (each for sets in kinds(study).values() for each in sets):
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
    config = study.config.orthogonal
    found.text = [
        "With A frozen and taken from disjoint blocks of orthogonal rows, A1 A2^T = 0, so the "
        "cosine of two deltas is 0 in every module whatever is trained. If overlap of deltas were "
        "what makes sums lose, these would lose nothing. Interference: perplexity of the sum at "
        "weight 1 over that of the oracle router of the same adapters. With a frozen disjoint A: "
        + covered(len(config.seeds) if config else 0),
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
                    *_cosine(results, sets, union),
                    perplexity_cell(routers),
                    perplexity_cell(sums),
                    change_cell(changes[union, name]),
                ]
            )
    found.tables = [
        Table(
            "Interference by kind of A",
            [
                "sum",
                "A",
                "RMS cosine",
                "floor",
                "perplexity, oracle router",
                "perplexity, sum",
                "interference",
            ],
            rows,
        )
    ]
    largest = largest_cosine(study, results)
    triple = changes.get((study.config.domains, "frozen disjoint A"))
    found.claims = [
        Claim(
            f"Frozen disjoint A makes every module's cosine 0 (below {_ZERO_COSINE:.0e}).",
            exactly(None if largest is None else largest < _ZERO_COSINE),
            f"largest {largest:.1e}" if largest is not None else "",
        ),
        Claim(
            "Interference stays without any overlap of deltas: the sum of three is at least 5 % "
            "worse than the oracle router.",
            at_least(triple, 5),
            change_cell(triple) or "",
            Plain(
                "sums lose even where their deltas do not overlap at all",
                "Sums lose even where their deltas are exactly orthogonal: interference does not "
                "need any overlap of deltas.",
                "Where deltas are exactly orthogonal, a sum of three loses less than 5 %.",
            ),
        ),
    ]
    return found


def _cosine(
    results: Results, sets: list[dict[str, AdapterSpec]], union: tuple[str, ...]
) -> tuple[Cell, Cell]:
    """Return the RMS cosine and its floor."""
    pairs: list[Pair] = [
        pair for specs in sets for pair in combinations([specs[d] for d in union], 2)
    ]
    found = [results.pair(pair) for pair in pairs]
    mean = mean_cell(each.rms if each else None for each in found)
    floor = next((each.floor for each in found if each), None)
    if all(spec.block for pair in pairs for spec in pair):
        # What is 0 but for rounding would be a long row of zeros.
        return (f"{mean:.1e}" if isinstance(mean, float) else mean), "0 by construction"
    return mean, floor


def largest_cosine(study: Study, results: Results) -> float | None:
    """Return the largest absolute cosine of any module of adapters with frozen disjoint A.

    None unless all are known.
    """
    config = study.config.orthogonal
    found = [
        results.pair(pair)
        for seed in (config.seeds if config else ())
        for pair in combinations(adapters(study, seed).values(), 2)
    ]
    known = [each for each in found if each is not None]
    if not known or len(known) < len(found):
        return None
    return max(abs(cosine) for each in known for cosine in each.cosines.values())

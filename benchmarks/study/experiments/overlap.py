"""Graded overlap: a share of one domain's rows in the place of rows of another."""

from __future__ import annotations

import math
from typing import Any

from benchmarks.report import Cell, Table
from benchmarks.study.cells import change_cell, covered, mean_cell, perplexity_cell
from benchmarks.study.config import Overlap
from benchmarks.study.document import Claim, Picture, Plain, Section
from benchmarks.study.experiments.seeds import cosine_bounds, mark_bounds
from benchmarks.study.palette import ACCENT, INK
from benchmarks.study.results import Results
from benchmarks.study.statistics import (
    Interval,
    Losses,
    fit_line,
    jackknife,
    join,
    mean_if_known,
    percent,
    slope_interval,
)
from benchmarks.study.study import AdapterSpec, Needs, Study, total
from benchmarks.study.verdict import at_least

# The mixed adapter's rows and order follow from a seed of its own: at share 1 it has seen the same
# domain as the other adapter, not the same rows in the same order.
_MIXED = 200
_OTHER_A = 300


def _options(study: Study) -> dict[str, Any]:
    """Return the config's options: what is tuned for a domain would change along the axis."""
    training = study.config.training
    return {
        "epochs": training.epochs,
        "batch_size": training.batch_size,
        "learning_rate": training.learning_rate,
        "dropout": training.dropout,
    }


def source(study: Study, overlap: Overlap, seed: int) -> AdapterSpec:
    """Return the adapter of the domain whose rows are mixed into the other."""
    return study.fundamental(overlap.source, seed, **_options(study))


def mixed(study: Study, overlap: Overlap, share: float, seed: int, *, shared: bool) -> AdapterSpec:
    """Return the target's adapter with a share of the source's rows, from the same A or not.

    It has as many rows at every share: as many as the smaller of the two domains.
    """
    rows = min(study.rows(overlap.source), study.rows(overlap.target))
    taken = round(share * rows)
    portions = [(overlap.source, taken), (overlap.target, rows - taken)]
    return study.spec(
        [portion for portion in portions if portion[1]],
        seed=_MIXED + seed,
        init_seed=seed if shared else _OTHER_A + seed,
        **_options(study),
    )


def needs(study: Study) -> Needs:
    """Ask for both adapters and their sum on both domains, and for their cosine."""
    wanted = Needs()
    overlap = study.config.overlap
    if overlap is None:
        return wanted
    scored = study.scored([overlap.source, overlap.target])
    for seed in overlap.seeds:
        first = source(study, overlap, seed)
        wanted.score(total(first), scored)
        for share in overlap.shares:
            for shared in (True, False):
                second = mixed(study, overlap, share, seed, shared=shared)
                wanted.score(total(second), scored)
                wanted.score(total(first, second), scored)
                wanted.cosines([first, second])
    return wanted


def section(study: Study, results: Results) -> Section:
    """Tell how cosine and interference grow with what two adapters have in common."""
    found = Section("overlap", "Graded overlap")
    overlap = study.config.overlap
    if overlap is None:
        return found
    found.text = [
        f"The adapter of {overlap.source} is summed with one trained on {overlap.target}, of whose "
        f"rows a share p is replaced by rows of {overlap.source}; they are sampled anew, and are "
        "from the same domain, not the same rows. The mixed adapter has "
        f"{min(study.rows(overlap.source), study.rows(overlap.target)):,} rows at every share, and "
        "the config's own options whatever tuning found. Cost over the better adapter: perplexity "
        "of the sum on both domains over that of the better of the two adapters for each domain, "
        "chosen on the test rows themselves. " + covered(len(overlap.seeds)),
    ]
    rows: list[list[Cell]] = [
        [
            "same" if shared else "different",
            share,
            mean_cell(_cosines(study, results, overlap, share, shared=shared)),
            _floor(study, results, overlap, share, shared=shared),
            *(
                perplexity_cell(
                    [
                        results.loss(
                            total(
                                source(study, overlap, seed),
                                mixed(study, overlap, share, seed, shared=shared),
                            ),
                            domain,
                        )
                        for seed in overlap.seeds
                    ]
                )
                for domain in (overlap.source, overlap.target)
            ),
            change_cell(_cost(study, results, overlap, share, shared=shared)),
        ]
        for shared in (True, False)
        for share in overlap.shares
    ]
    found.tables = [
        Table(
            f"{overlap.source} + ({overlap.target} with a share of {overlap.source})",
            [
                "A",
                "share",
                "RMS cosine",
                "floor",
                f"sum's perplexity, {overlap.source}",
                f"{overlap.target}",
                "cost over the better adapter",
            ],
            rows,
        )
    ]
    found.pictures = [
        Picture(
            "overlap",
            "Cosine, and cost over the better adapter, against the share of rows from the same "
            "domain. Dotted: floors; dashed: ceilings (one domain trained twice, from the same A "
            "or not).",
            lambda figure: _draw(figure, study, results, overlap),
            (8.5, 3.8),
        )
    ]
    found.claims = [_claim(study, results, overlap, shared=shared) for shared in (True, False)]
    return found


def _claim(study: Study, results: Results, overlap: Overlap, *, shared: bool) -> Claim:
    rise = _rise(study, results, overlap, shared=shared)
    start = "the same A" if shared else "different A"
    return Claim(
        f"From {start} the RMS cosine grows by at least 25 % from share 0 to share 1 of rows from "
        "the same domain (line through the logarithms).",
        at_least(rise, 25),
        change_cell(rise) or "",
        Plain(
            f"from {start} the cosine tells how much two adapters' data have in common",
            f"From {start} the cosine grows with what two adapters' data have in common.",
            f"From {start} the cosine hardly grows with what two adapters' data have in common.",
        ),
    )


def _rise(study: Study, results: Results, overlap: Overlap, *, shared: bool) -> Interval | None:
    """Return the growth of the cosine over the axis, in per cent; None unless all is known.

    Over several seeds they are the units; of one seed only the scatter about its line is known.
    """
    points: dict[int, list[tuple[float, float]]] = {seed: [] for seed in overlap.seeds}
    for share in overlap.shares:
        for seed, cosine in zip(
            overlap.seeds,
            _cosines(study, results, overlap, share, shared=shared),
            strict=True,
        ):
            if not cosine:
                return None
            points[seed].append((share, math.log(cosine)))

    def slope(kept: frozenset[int]) -> float | None:
        there = [point for seed in kept for point in points[seed]]
        line = fit_line(*zip(*there, strict=True)) if there else None
        return line.slope if line else None

    if len(points) == 1:
        (there,) = points.values()
        found = slope_interval(*zip(*there, strict=True))
    else:
        found = jackknife(points, slope)
    return found.through(percent) if found else None


def _floor(
    study: Study, results: Results, overlap: Overlap, share: float, *, shared: bool
) -> float | None:
    for seed in overlap.seeds:
        second = mixed(study, overlap, share, seed, shared=shared)
        if geometry := results.pair((source(study, overlap, seed), second)):
            return geometry.floor
    return None


def _cosines(
    study: Study, results: Results, overlap: Overlap, share: float, *, shared: bool
) -> list[float | None]:
    found = []
    for seed in overlap.seeds:
        second = mixed(study, overlap, share, seed, shared=shared)
        geometry = results.pair((source(study, overlap, seed), second))
        found.append(geometry.rms if geometry else None)
    return found


def _cost(
    study: Study, results: Results, overlap: Overlap, share: float, *, shared: bool
) -> Interval | None:
    pairs = []
    for seed in overlap.seeds:
        first = source(study, overlap, seed)
        second = mixed(study, overlap, share, seed, shared=shared)
        domains = (overlap.source, overlap.target)
        best: list[Losses] = []
        for domain in domains:
            alone = [results.loss(total(spec), domain) for spec in (first, second)]
            known = [each for each in alone if each is not None]
            if len(known) == 2:
                best.append(min(known, key=lambda each: each.mean))
        summed = results.union(total(first, second), study.scored(domains))
        pairs.append((join(best) if len(best) == 2 else None, summed))
    return results.change(pairs)


def _draw(figure: Any, study: Study, results: Results, overlap: Overlap) -> None:
    left, right = figure.subplots(1, 2, sharex=True)
    for shared, color in ((True, ACCENT), (False, INK)):
        label = "same A" if shared else "different A"
        cosines = [
            mean_if_known(_cosines(study, results, overlap, p, shared=shared))
            for p in overlap.shares
        ]
        left.plot(
            overlap.shares,
            [c if c is not None else math.nan for c in cosines],
            "o-",
            color=color,
            label=label,
        )
        found = [_cost(study, results, overlap, p, shared=shared) for p in overlap.shares]
        known = [(p, each) for p, each in zip(overlap.shares, found, strict=True) if each]
        if known:
            right.errorbar(
                [p for p, _ in known],
                [each.value for _, each in known],
                [
                    [max(0.0, each.value - each.low) for _, each in known],
                    [max(0.0, each.high - each.value) for _, each in known],
                ],
                fmt="o-",
                color=color,
                capsize=2,
                label=label,
            )
    mark_bounds(left, cosine_bounds(study, results), across=True)
    left.set(xlabel=f"share of {overlap.source} rows", ylabel="RMS cosine", ylim=(0, None))
    right.set(xlabel=f"share of {overlap.source} rows", ylabel="cost over the better adapter, %")
    right.axhline(0, color="gray", lw=0.8)
    figure.legend(
        *left.get_legend_handles_labels(), loc="outside lower center", ncols=3, fontsize=7
    )

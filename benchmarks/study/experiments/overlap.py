"""Graded overlap: a share of one domain's rows in the place of rows of another."""

from __future__ import annotations

from typing import Any

from benchmarks.report import Cell, Table
from benchmarks.study.cells import change_cell, mean_cell, perplexity_cell
from benchmarks.study.config import Overlap
from benchmarks.study.document import Claim, Picture, Section
from benchmarks.study.palette import ACCENT, INK
from benchmarks.study.results import Results
from benchmarks.study.statistics import Interval, Losses, join, rank_correlation
from benchmarks.study.study import AdapterSpec, Needs, Study, total
from benchmarks.study.ticks import legend

# The mixed adapter's rows and order follow from a seed of its own: at share 1 it has seen the same
# domain as the other adapter, not the same rows in the same order.
_MIXED = 200
_OTHER_A = 300


def source(study: Study, overlap: Overlap, seed: int) -> AdapterSpec:
    """Return the adapter of the domain whose rows are mixed into the other."""
    return study.fundamental(overlap.source, seed)


def mixed(study: Study, overlap: Overlap, share: float, seed: int, *, shared: bool) -> AdapterSpec:
    """Return the target's adapter with a share of the source's rows, from the same A or not."""
    rows = study.rows(overlap.target)
    taken = min(round(share * rows), study.rows(overlap.source))
    portions = [(overlap.source, taken), (overlap.target, rows - taken)]
    return study.spec(
        [portion for portion in portions if portion[1]],
        seed=_MIXED + seed,
        init_seed=seed if shared else _OTHER_A + seed,
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
        f"rows a share p is replaced by rows of {overlap.source}. Interference: perplexity of the "
        "sum on both domains over that of the better of the two adapters for each domain. Seeds: "
        + ", ".join(map(str, overlap.seeds))
        + ".",
    ]
    rows: list[list[Cell]] = [
        [
            "same" if shared else "different",
            share,
            mean_cell(_cosines(study, results, overlap, share, shared=shared)),
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
            change_cell(_interference(study, results, overlap, share, shared=shared)),
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
                f"sum's perplexity, {overlap.source}",
                f"{overlap.target}",
                "interference",
            ],
            rows,
        )
    ]
    found.pictures = [
        Picture(
            "overlap",
            "Cosine and interference against the share of rows in common.",
            lambda figure: _draw(figure, study, results, overlap),
            (8.5, 3.4),
        )
    ]
    claims = []
    for shared in (True, False):
        cosines = [
            mean_cell(_cosines(study, results, overlap, p, shared=shared)) for p in overlap.shares
        ]
        known = [(p, c) for p, c in zip(overlap.shares, cosines, strict=True) if c is not None]
        trend = (
            rank_correlation(*zip(*known, strict=True)) if len(known) == len(cosines) > 1 else None
        )
        claims.append(
            Claim(
                f"With {'the same' if shared else 'a different'} A the RMS cosine grows with the "
                "share of rows in common (rank correlation at least 0.9).",
                trend >= 0.9 if trend is not None else None,
                f"rank correlation {trend:.2f}, from {known[0][1]:.3f} to {known[-1][1]:.3f}"
                if trend is not None
                else "",
            )
        )
    found.claims = claims
    return found


def _cosines(
    study: Study, results: Results, overlap: Overlap, share: float, *, shared: bool
) -> list[float | None]:
    found = []
    for seed in overlap.seeds:
        second = mixed(study, overlap, share, seed, shared=shared)
        geometry = results.pair((source(study, overlap, seed), second))
        found.append(geometry.rms if geometry else None)
    return found


def _interference(
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
            mean_cell(_cosines(study, results, overlap, p, shared=shared)) for p in overlap.shares
        ]
        left.plot(
            overlap.shares,
            [c if c is not None else float("nan") for c in cosines],
            "o-",
            color=color,
            label=label,
        )
        found = [_interference(study, results, overlap, p, shared=shared) for p in overlap.shares]
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
    left.set(xlabel=f"share of {overlap.source} rows", ylabel="RMS cosine", ylim=(0, None))
    right.set(xlabel=f"share of {overlap.source} rows", ylabel="interference, %")
    right.axhline(0, color="gray", lw=0.8)
    legend(left)

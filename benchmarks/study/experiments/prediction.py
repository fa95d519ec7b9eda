"""Interference foretold: what two adapters' geometry says of the loss of their sum."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import numpy as np

from benchmarks.report import Cell, Table
from benchmarks.study.cells import change_cell, interval_cell
from benchmarks.study.document import Claim, Picture, Plain, Section
from benchmarks.study.experiments.seeds import Bounds, mark_bounds, twin
from benchmarks.study.palette import ACCENT, INK
from benchmarks.study.results import Results
from benchmarks.study.statistics import (
    LEAST_RANKED,
    LeftOut,
    jackknife,
    leave_one_out,
    mean_if_known,
    percent,
    rank_correlation,
)
from benchmarks.study.study import AdapterSpec, Needs, Pair, Study, total
from benchmarks.study.verdict import Verdict, at_least, at_most, every


@dataclass(frozen=True)
class Case:
    """Two adapters of different domains.

    Attributes:
        domains: Theirs.
        shared: They start from one A.
        adapters: They.
        ceilings: For each domain two adapters of it, related as the case's own are: from one A, or
            from different ones.
    """

    domains: tuple[str, str]
    shared: bool
    adapters: Pair
    ceilings: tuple[Pair, Pair]


def cases(study: Study) -> list[Case]:
    """Return every pair of domains, once with a shared A and once without."""
    config = study.config.prediction
    if config is None:
        return []
    here, there = config.seeds[0], config.seeds[-1]

    def own(domain: str, seed: int) -> AdapterSpec:
        return study.fundamental(domain, seed)

    found = []
    for first, second in combinations(config.domains, 2):
        for shared in (True, False) if here != there else (True,):
            other = here if shared else there
            ceilings = tuple(
                (own(d, here), twin(study, d, here) if shared else own(d, there))
                for d in (first, second)
            )
            found.append(
                Case(
                    (first, second),
                    shared,
                    (own(first, here), own(second, other)),
                    (ceilings[0], ceilings[1]),
                )
            )
    return found


def needs(study: Study) -> Needs:
    """Ask for each sum and each of its adapters on the rows of both domains, and the geometry."""
    wanted = Needs()
    config = study.config.prediction
    for case in cases(study):
        scored = study.scored(case.domains)
        wanted.score(total(*case.adapters), scored)
        for domain, spec in zip(case.domains, case.adapters, strict=True):
            wanted.score(total(spec), study.scored([domain]))
        wanted.cosines(case.adapters)
        for pair in case.ceilings:
            wanted.cosines(pair)
        if config is not None and config.activations:
            wanted.activations[case.adapters] = None
    return wanted


_ALL = "all of them"
_COSINE = "RMS cosine"
_NORMS = "log of the norms' product"
_SHARED = "whether A is shared, nothing else"
# By how much the error of the cosine must lie below that of `_SHARED`, in per cent.
_MARGIN = 10.0


@dataclass(frozen=True)
class Observation:
    """One case, measured.

    Attributes:
        cost: Interference, nats a token: mean loss of the sum less that of the oracle router.
        features: {name: value} of what is known before merging.
        floor: RMS cosine of random deltas, from one A or not as the case has it.
        ceiling: RMS cosine of two adapters of one domain, mean over both domains.
    """

    case: Case
    cost: float
    features: dict[str, float]
    floor: float
    ceiling: float


@dataclass(frozen=True)
class Observed:
    """What there is to foretell.

    Attributes:
        cases: Those of which everything is known and finite.
        not_finite: How many have a sum or an adapter without a finite loss; they are left out.
        missing: How many were not run.
    """

    cases: list[Observation]
    not_finite: int
    missing: int


def observations(study: Study, results: Results) -> Observed:
    """Return the cases of which everything is known."""
    config = study.config.prediction
    found = []
    not_finite = missing = 0
    for case in cases(study):
        plain = results.pair(case.adapters)
        twice = [results.pair(pair) for pair in case.ceilings]
        ceiling = mean_if_known(each.rms if each else None for each in twice)
        summed = results.union(total(*case.adapters), study.scored(case.domains))
        router = results.router(dict(zip(case.domains, case.adapters, strict=True)))
        weighted = (
            results.pair(case.adapters, activations=True)
            if config is not None and config.activations
            else None
        )
        if (
            plain is None
            or ceiling is None
            or summed is None
            or router is None
            or (config is not None and config.activations and weighted is None)
        ):
            missing += 1
            continue
        if not (summed.finite and router.finite):
            not_finite += 1
            continue
        features = {
            _COSINE: plain.rms,
            "RMS cosine, weighted by norms": plain.weighted_rms,
            "cosine of the whole deltas": plain.weighted,
            "RMS cosine over its ceiling": plain.rms / ceiling,
        }
        if weighted is not None:
            features["activation-weighted RMS cosine"] = weighted.rms
            features["activation-weighted cosine of the whole"] = weighted.weighted
        # Not in the paper: how much there is to collide, whatever its direction.
        norms = [plain.products[module][1:] for module in plain.products]
        features[_NORMS] = float(
            np.mean([np.log(first * second) for first, second in norms if first and second])
        )
        # If this does as well, the cosines tell no more than how the adapters were begun.
        features[_SHARED] = float(case.shared)
        cost = summed.mean - router.mean
        found.append(Observation(case, cost, features, plain.floor, ceiling))
    return Observed(found, not_finite, missing)


def leave_pairs_out(observed: Sequence[Observation], names: Sequence[str]) -> LeftOut:
    """Foretell each pair of domains from the others; both its cases are left out together."""
    return leave_one_out(
        [[each.features[name] for name in names] for each in observed],
        [each.cost for each in observed],
        [each.case.domains for each in observed],
    )


def section(study: Study, results: Results) -> Section:
    """Tell how well geometry foretells interference."""
    found = Section("prediction", "Interference foretold from geometry")
    everything = observations(study, results)
    observed = everything.cases
    config = study.config.prediction
    pairs = {each.case.domains for each in observed}
    found.text = [
        f"{len(observed)} cases: {len(pairs)} different pairs of "
        f"{len(config.domains) if config else 0} domains, each with a shared A and without; the "
        "pairs share domains and adapters, so they are fewer independent points than they seem. "
        f"{len(set(config.seeds)) if config else 0} seeds, the second for a different A only: no "
        "interval here covers their chance. "
        + (
            f"{everything.not_finite} cases have no finite loss and are left out. "
            if everything.not_finite
            else "No case has a loss that is not finite. "
        )
        + "What is foretold is the interference of the sum at weight 1 as nats a token: its mean "
        "loss less that of the oracle router, on both domains. A line is fitted to all pairs of "
        "domains but one, and foretells that one (with and without a shared A together, so that "
        "no pair of domains is on both sides). R2 compares with the mean of the others: 0 is no "
        "better than that. Intervals of claims: domains are left out one by one, with all pairs "
        "that touch them.",
    ]
    if len(pairs) < 3:
        verdict = Verdict.NOT_RUN if everything.missing else Verdict.OPEN
        found.claims = [
            Claim(_CLAIM, verdict, plain=_PLAIN),
            Claim(_APART, verdict),
            Claim(_BY_SIZE, verdict, plain=_BY_SIZE_PLAIN),
        ]
        return found
    names = list(observed[0].features)
    subsets = {
        "all": observed,
        "same A": [each for each in observed if each.case.shared],
        "different A": [each for each in observed if not each.case.shared],
    }
    subsets = {name: each for name, each in subsets.items() if len(each) > len(names) + 1}
    rows: list[list[Cell]] = []
    for name in (*names, _ALL):
        used = names if name == _ALL else [name]
        cells: list[Cell] = [name]
        for subset in subsets.values():
            left = leave_pairs_out(subset, used)
            costs = [each.cost for each in subset]
            ranked = left.predicted if name == _ALL else [each.features[name] for each in subset]
            cells += [left.error, left.r2, rank_correlation(list(ranked), costs)]
        rows.append(cells)
    found.tables = [
        Table(
            "Leave-one-pair-out",
            [
                "foretold by",
                *(
                    f"{of}: {column}"
                    for of, subset in subsets.items()
                    for column in (f"error, nats (n={len(subset)})", "R2", "rank correlation")
                ),
            ],
            rows,
        )
    ]
    found.pictures = [
        Picture(
            "prediction",
            "Interference of every pair against the RMS cosine and against the activation-weighted "
            "cosine, and as foretold (leave one pair out) by all features together. Left, dotted: "
            "floors (random deltas); dashed: mean ceilings (one domain trained twice).",
            lambda figure: _draw(figure, observed),
            (10.0, 4.0),
        )
    ]
    found.data = {
        "observations": [
            {"domains": each.case.domains, "shared": each.case.shared, "cost": each.cost}
            | each.features
            for each in observed
        ]
    }
    found.claims = _claims(everything, names)
    return found


_CLAIM = (
    "The RMS cosine alone foretells interference: leave-one-pair-out R2 at least 0.5 over all "
    f"cases, and an error at least {_MARGIN:.0f} % below that of knowing only whether A is shared."
)
_PLAIN = Plain(
    "the cosine of two adapters, which is known before merging, foretells how much their sum loses",
    "The cosine of two adapters, which is known before merging, foretells how much their sum "
    "loses, and better than knowing only whether they started from one A.",
    "The cosine of two adapters does not foretell how much their sum loses, or no better than "
    "knowing only whether they started from one A.",
)
_BY_SIZE = (
    "The sizes of the two deltas alone, whatever their directions, foretell interference: by the "
    "product of their norms leave-one-pair-out R2 is at least 0.5 over all cases, and the error at "
    f"least {_MARGIN:.0f} % below that of the RMS cosine. (Added after mini had been looked at.)"
)
_BY_SIZE_PLAIN = Plain(
    "the sizes of two deltas, whatever their directions, foretell how much their sum loses",
    "The sizes of two deltas foretell how much their sum loses, and clearly better than the cosine "
    "between them.",
    "The sizes of two deltas do not foretell how much their sum loses, or not clearly better than "
    "the cosine between them.",
)
_APART = (
    "Among pairs that are alike in sharing A or not, a cosine of any kind still ranks them (rank "
    "correlation at least 0.6 both with the same and with different A; the best of the kinds is "
    "taken, which favours the claim)."
)


def _within(observed: Sequence[Observation], kept: frozenset[str]) -> list[Observation]:
    return [each for each in observed if kept.issuperset(each.case.domains)]


def _claims(everything: Observed, names: Sequence[str]) -> list[Claim]:
    observed = everything.cases
    domains = {domain for each in observed for domain in each.case.domains}

    def judge(name: str, rival: str) -> tuple[Verdict, str]:
        """Judge that `name` foretells, with an error clearly below that of `rival`."""

        def left_out(kept: frozenset[str], by: str) -> LeftOut | None:
            there = _within(observed, kept)
            enough = len({each.case.domains for each in there}) >= 3
            return leave_pairs_out(there, [by]) if enough else None

        def r2(kept: frozenset[str]) -> float | None:
            found = left_out(kept, name)
            return found.r2 if found else None

        def error_ratio(kept: frozenset[str]) -> float | None:
            own, other = left_out(kept, name), left_out(kept, rival)
            if own is None or other is None or own.error <= 0 or other.error <= 0:
                return None
            return float(np.log(own.error / other.error))

        foretold = jackknife(domains, r2, "domains", (-np.inf, 1.0))
        against = jackknife(domains, error_ratio, "domains")
        better = against.through(percent) if against else None
        own, other = (leave_pairs_out(observed, [by]) for by in (name, rival))
        return (
            every([at_least(foretold, 0.5), at_most(better, -_MARGIN)]),
            f"R2 {interval_cell(foretold, 2)}; error {own.error:.3f} nats by {name}, "
            f"{other.error:.3f} by {rival}: {change_cell(better)}",
        )

    judged = [judge(_COSINE, _SHARED), judge(_NORMS, _COSINE)]
    by_name = {name: _ranked(observed, name, frozenset(domains)) for name in names}
    best = {
        name: value for name, value in by_name.items() if "cosine" in name and value is not None
    }
    top = max(best, key=lambda name: best[name]) if best else None
    ranked = (
        jackknife(domains, lambda kept: _ranked(observed, top, kept), "domains", (-1.0, 1.0))
        if top
        else None
    )
    apart = at_least(ranked, 0.6) if ranked else Verdict.OPEN
    (cosine, cosine_shown), (size, size_shown) = judged
    if everything.missing:
        cosine = size = apart = Verdict.NOT_RUN
    return [
        Claim(_CLAIM, cosine, cosine_shown, _PLAIN),
        Claim(
            _APART,
            apart,
            f"best: {top}, in the weaker of both {interval_cell(ranked, 2)}" if top else "",
        ),
        Claim(_BY_SIZE, size, size_shown, _BY_SIZE_PLAIN),
    ]


def _ranked(observed: Sequence[Observation], name: str, kept: frozenset[str]) -> float | None:
    """Return the smaller rank correlation of cases with a shared A and of those without."""
    found = []
    for shared in (True, False):
        alike = [each for each in _within(observed, kept) if each.case.shared == shared]
        if len(alike) < LEAST_RANKED:
            return None
        found.append(
            rank_correlation([each.features[name] for each in alike], [each.cost for each in alike])
        )
    # Where nothing varies, nothing is ranked.
    return float(np.nan_to_num(found).min())


def _draw(figure: Any, observed: Sequence[Observation]) -> None:
    names = list(observed[0].features)
    activation = next((name for name in names if name.startswith("activation")), names[1])
    left_out = leave_pairs_out(observed, names)
    costs = [each.cost for each in observed]
    panels = [
        (_COSINE, [each.features[_COSINE] for each in observed]),
        (activation, [each.features[activation] for each in observed]),
        ("foretold, nats a token", list(left_out.predicted)),
    ]
    grid = figure.subplots(1, 3, sharey=True)
    of_kind = [[each for each in observed if each.case.shared == shared] for shared in (0, 1)]
    apart, together = (
        [mean_if_known(each.floor for each in kind), mean_if_known(each.ceiling for each in kind)]
        for kind in of_kind
    )
    for axes, (name, values) in zip(grid, panels, strict=True):
        for shared, color in ((True, ACCENT), (False, INK)):
            at = [i for i, each in enumerate(observed) if each.case.shared == shared]
            axes.scatter(
                [values[i] for i in at],
                [costs[i] for i in at],
                color=color,
                s=16,
                alpha=0.8,
                label="same A" if shared else "different A",
            )
        axes.set_xlabel(name, fontsize=8)
    ends = [min(costs), max(costs)]
    grid[2].plot(ends, ends, color="gray", lw=0.8)
    grid[0].set_ylabel("interference, nats a token")
    mark_bounds(grid[0], Bounds(apart[0], together[0], apart[1], together[1]))
    figure.legend(
        *grid[0].get_legend_handles_labels(), loc="outside lower center", ncols=6, fontsize=7
    )

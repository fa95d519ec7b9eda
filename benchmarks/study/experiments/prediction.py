"""Interference foretold: what two adapters' geometry says of the loss of their sum."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import numpy as np

from benchmarks.report import Cell, Table
from benchmarks.study.cells import mean_cell
from benchmarks.study.document import Claim, Picture, Section
from benchmarks.study.experiments.seeds import twin
from benchmarks.study.palette import ACCENT, INK
from benchmarks.study.results import Results
from benchmarks.study.statistics import LeftOut, leave_one_out, rank_correlation
from benchmarks.study.study import AdapterSpec, Needs, Pair, Study, total
from benchmarks.study.ticks import legend


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


@dataclass(frozen=True)
class Observation:
    """One case, measured.

    Attributes:
        cost: Mean loss of the sum less that of the oracle router, nats a token.
        features: {name: value} of what is known before merging.
    """

    case: Case
    cost: float
    features: dict[str, float]


def observations(study: Study, results: Results) -> list[Observation]:
    """Return the cases of which everything is known."""
    config = study.config.prediction
    found = []
    for case in cases(study):
        plain = results.pair(case.adapters)
        ceiling = mean_cell(
            geometry.rms for pair in case.ceilings if (geometry := results.pair(pair))
        )
        summed = results.union(total(*case.adapters), study.scored(case.domains))
        router = results.router(dict(zip(case.domains, case.adapters, strict=True)))
        if plain is None or ceiling is None or summed is None or router is None:
            continue
        features = {
            "RMS cosine": plain.rms,
            "RMS cosine, weighted by norms": plain.weighted_rms,
            "cosine of the whole deltas": plain.weighted,
            "RMS cosine over its ceiling": plain.rms / ceiling,
        }
        if config is not None and config.activations:
            weighted = results.pair(case.adapters, activations=True)
            if weighted is None:
                continue
            features["activation-weighted RMS cosine"] = weighted.rms
            features["activation-weighted cosine of the whole"] = weighted.weighted
        # Not in the paper: how much there is to collide, whatever its direction.
        norms = [plain.products[module][1:] for module in plain.products]
        features["log of the norms' product"] = float(
            np.mean([np.log(first * second) for first, second in norms if first and second])
        )
        # If this does as well, the cosines tell no more than how the adapters were begun.
        features["whether A is shared, nothing else"] = float(case.shared)
        found.append(Observation(case, summed.mean - router.mean, features))
    return found


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
    observed = observations(study, results)
    config = study.config.prediction
    found.text = [
        f"{len(observed)} pairs of adapters"
        + (f", of {len(config.domains)} domains" if config else "")
        + ", with a shared A and without. What is foretold: mean loss of the sum at weight 1 less "
        "that of the oracle router, nats a token, on both domains. A line is fitted to all pairs "
        "of domains but one, and foretells that one (with and without a shared A together). R2 "
        "compares with the mean of the others: 0 is no better than that.",
    ]
    if len({each.case.domains for each in observed}) < 3:
        found.claims = [Claim(_CLAIM, None), Claim(_APART, None)]
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
            "cosine, and as foretold (leave one pair out) by all features together.",
            lambda figure: _draw(figure, observed),
            (10.0, 3.5),
        )
    ]
    found.data = {
        "observations": [
            {"domains": each.case.domains, "shared": each.case.shared, "cost": each.cost}
            | each.features
            for each in observed
        ]
    }
    found.claims = _claims(observed, names)
    return found


_CLAIM = (
    "The RMS cosine alone foretells interference (leave-one-pair-out R2 at least 0.5, all pairs)."
)
_APART = (
    "Among pairs that are alike in sharing A or not, a cosine of any kind still ranks them (rank "
    "correlation at least 0.6 both with the same and with different A)."
)


def _claims(observed: Sequence[Observation], names: Sequence[str]) -> list[Claim]:
    alone = leave_pairs_out(observed, ["RMS cosine"])
    best: dict[str, float] = {}
    for name in names:
        if "cosine" not in name:
            continue
        ranked = []
        for shared in (True, False):
            alike = [each for each in observed if each.case.shared == shared]
            if len(alike) > 2:
                ranked.append(
                    rank_correlation(
                        [each.features[name] for each in alike], [each.cost for each in alike]
                    )
                )
        if len(ranked) == 2:
            best[name] = min(ranked)
    top = max(best, key=lambda name: best[name]) if best else None
    return [
        Claim(_CLAIM, alone.r2 >= 0.5, f"R2 {alone.r2:.2f}, error {alone.error:.3f} nats"),
        Claim(
            _APART,
            best[top] >= 0.6 if top else None,
            f"best: {top}, at least {best[top]:.2f} in both" if top else "",
        ),
    ]


def _draw(figure: Any, observed: Sequence[Observation]) -> None:
    names = list(observed[0].features)
    activation = next((name for name in names if name.startswith("activation")), names[1])
    left_out = leave_pairs_out(observed, names)
    costs = [each.cost for each in observed]
    panels = [
        ("RMS cosine", [each.features["RMS cosine"] for each in observed]),
        (activation, [each.features[activation] for each in observed]),
        ("foretold, nats a token", list(left_out.predicted)),
    ]
    grid = figure.subplots(1, 3, sharey=True)
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
    legend(grid[0])

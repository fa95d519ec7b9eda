"""The paper's own results: seven adapters, seven compositions, every model on every domain."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import combinations
from typing import Any

import numpy as np

from benchmarks.report import Cell, Table
from benchmarks.study import paper
from benchmarks.study.cells import (
    HUGE_PERCENT,
    arms_of,
    change_cell,
    covered,
    interval_cell,
    mean_cell,
    perplexity_cell,
)
from benchmarks.study.document import Claim, Picture, Plain, Section
from benchmarks.study.experiments.seeds import cosine_bounds, mark_bounds
from benchmarks.study.floor import random_floor
from benchmarks.study.palette import ACCENT, INK
from benchmarks.study.results import PairGeometry, Results
from benchmarks.study.statistics import (
    LEAST_RANKED,
    Interval,
    Line,
    Losses,
    fit_line,
    jackknife,
    mean_if_known,
    rank_correlation,
)
from benchmarks.study.study import Arm, Composition, Needs, Study, Terms, total
from benchmarks.study.ticks import legend, plain_log, whole_numbers
from benchmarks.study.verdict import at_least, at_most, every
from superpose_adapters.geometry import module_type, rms

# What a sum may lose before it is called worse than the joint adapter.
CLOSE_PERCENT = 30.0


def needs(study: Study) -> Needs:
    """Ask for the matrix of the first arm, and for the rows of their own domains of the others."""
    wanted = Needs()
    for at, arm in enumerate(study.arms):
        every = study.scored(study.config.domains)
        if at == 0:
            wanted.score((), every)
        for spec in arm.fundamental.values():
            wanted.score(total(spec), every)
        for domains, spec in arm.joint.items():
            wanted.score(total(spec), every if at == 0 else study.scored(domains))
        for composition in study.compositions(arm):
            scored = every if at == 0 else study.scored(composition.domains)
            wanted.score(total(*composition.summed), scored)
            wanted.cosines(composition.summed)
    return wanted


def section(study: Study, results: Results) -> Section:
    """Lay out the paper's tables beside ours."""
    found = Section("compositions", "The paper's tables")
    kinds = [("shared A", [arm for arm in study.arms if arm.shared])]
    different = [arm for arm in study.arms if not arm.shared]
    if different:
        kinds.append(("different A", different))
    found.text = [
        "Seven adapters (three fundamental, three level-2, one level-3) and seven compositions, "
        f"all of rank {study.config.training.rank}, summed with weight 1. A change is the "
        "perplexity of the sum over that of the joint adapter trained on the same domains' rows, "
        "on the test rows of all its domains together; in brackets the 95 % interval. The paper "
        "does not say whether its adapters started from one A, so both are shown: "
        + "; ".join(f"{name}, {arms_of(len(arms))}, one a seed" for name, arms in kinds)
        + ". "
        + " ".join(covered(count) for count in dict.fromkeys(len(arms) for _, arms in kinds)),
        "Floors beside cosines are those of random deltas; the paper's depend on whether its "
        "adapters shared an A, and both are given. The cosine of three adapters is the mean over "
        "their pairs. Table 1 has no values of the paper beside it: tensors of another seed cannot "
        "be compared.",
    ]
    found.tables = [
        _tensors(study, results),
        _cosines_by_type(study, results, kinds),
        *_layers(study, results),
        _changes("Table 3: pairs", study, results, kinds, pairs=True),
        _changes("Table 4: triples", study, results, kinds, pairs=False),
        _fitted_lines(study, results),
        _single_adapters(study, results),
        _matrix(study, results),
    ]
    found.data = {"pairs, (RMS cosine, change in per cent)": pair_points(study, results)}
    found.pictures = [
        Picture("figure1", _FIGURE1, lambda figure: _figure1(figure, study, results), (9.5, 4.8)),
        Picture(
            "layers",
            "Cosine of two deltas, layer by layer (Tables 2 and 5), first arm of each kind. Same A "
            "and different A have colour scales of their own.",
            lambda figure: _heat_maps(figure, study, results, kinds),
            (9.5, 2.6 * len(kinds) + 1.2),
        ),
    ]
    found.claims = _claims(study, results)
    return found


_FIGURE1 = (
    "Figure 1: RMS cosine against the change of perplexity, sum over joint adapter. Left the "
    "paper's three pairs with their line, and its triples, which the line was not fitted to; its "
    f"floors lie left of the panel, at {paper.floor():.5f} (different A) and "
    f"{paper.floor(paper.RANK):.4f} (same A). Right ours, one point a pair and arm; dotted the "
    "floors (random deltas), dashed the ceilings (one domain trained twice)."
)


def _terms_of(composition: Composition) -> list[str]:
    return ["+".join(spec.domains) for spec in composition.summed]


def _tensors(study: Study, results: Results) -> Table:
    """Return the paper's Table 1: some tensors of one adapter."""
    first = next(iter(study.arms[0].fundamental.values()))
    record = results.adapter(first)
    rows = [
        [
            each["name"],
            "x".join(map(str, each["shape"])),
            ", ".join(f"{v:.4f}" for v in each["first"]),
        ]
        for each in (record["tensors"] if record else ())
    ]
    return Table(f"Table 1: tensors of {first.name}", ["name", "shape", "first five values"], rows)


def _cosines_by_type(
    study: Study, results: Results, kinds: Sequence[tuple[str, Sequence[Arm]]]
) -> Table:
    """Return Tables 2 and 5 in short: RMS over the layers, by module type."""
    types = sorted({module_type(module) for module in study.inputs.modules})
    rows: list[list[Cell]] = []
    used: set[str] = set()
    for at, composition in enumerate(study.compositions(study.arms[0])):
        if len(composition.summed) != 2:
            continue
        reported = paper.cosines(*_terms_of(composition))
        if reported is not None:
            by_type = dict(zip(paper.MODULE_TYPES, zip(*reported, strict=True), strict=True))
            cells = {name: rms(values) for name, values in by_type.items()}
            used |= set(cells)
            rows.append(
                [
                    composition.name,
                    "paper",
                    *(cells.get(t) for t in types),
                    paper.table_rms(reported),
                    f"{paper.floor():.5f} or {paper.floor(paper.RANK):.4f}",
                ]
            )
        for kind, arms in kinds:
            there = [list(study.compositions(arm))[at] for arm in arms]
            found = [results.pair((c.summed[0], c.summed[1])) for c in there]
            used |= {name for g in found if g for name in g.rms_by_type}
            rows.append(
                [
                    composition.name,
                    f"ours, {kind}",
                    *(mean_cell(g.rms_by_type.get(t) if g else None for g in found) for t in types),
                    mean_cell(g.rms if g else None for g in found),
                    next((g.floor for g in found if g), None),
                ]
            )
    keep = [at for at, name in enumerate(types) if name in used]
    return Table(
        "Tables 2 and 5: RMS cosine by module type",
        ["sum", "whose", *(types[at] for at in keep), "all", "floor of all"],
        [[*row[:2], *(row[2 + at] for at in keep), *row[-2:]] for row in rows],
    )


def _layers(study: Study, results: Results) -> list[Table]:
    """Return Tables 2 and 5 layer by layer: the first pair, and the level-2 sums."""
    compositions = _sums_of_two(study, study.arms[0])
    pair, level2 = compositions[:1], compositions[3:]
    tables = []
    for title, chosen in (("Table 2", pair), ("Table 5", level2)):
        columns: dict[str, dict[int, float]] = {}
        floors: dict[str, tuple[float, float]] = {}
        for composition in chosen:
            reported = paper.cosines(*_terms_of(composition))
            geometry = results.pair((composition.summed[0], composition.summed[1]))
            ours, types = layer_table(geometry.cosines) if geometry else ([], [])
            for whose, rows, names, sizes, rank in (
                ("paper", reported or [], paper.MODULE_TYPES, paper.MODULE_SIZES, paper.RANK),
                ("ours", ours, types, _sizes(geometry), composition.summed[0].rank),
            ):
                for at, name in enumerate(names if rows else ()):
                    column = f"{composition.name}, {whose}: {name}"
                    columns[column] = {layer: row[at] for layer, row in enumerate(rows)}
                    floors[column] = (
                        random_floor(*sizes[name]),
                        random_floor(*sizes[name], rank),
                    )
        layers = sorted({layer for column in columns.values() for layer in column})
        cells: list[list[Cell]] = [
            [layer, *(column.get(layer) for column in columns.values())] for layer in layers
        ]
        for at, kind in enumerate(("floor, different A", "floor, same A") if cells else ()):
            cells.append([kind, *(floor[at] for floor in floors.values())])
        tables.append(
            Table(
                f"{title}, layer by layer: cosines ({study.arms[0].name})",
                ["layer", *columns],
                cells,
            )
        )
    return tables


def _sizes(geometry: PairGeometry | None) -> dict[str, tuple[int, int]]:
    """Return {module type: (in, out)} of what two adapters change."""
    return {module_type(m): geometry.sizes[m] for m in geometry.cosines} if geometry else {}


def _changes(
    title: str,
    study: Study,
    results: Results,
    kinds: Sequence[tuple[str, Sequence[Arm]]],
    *,
    pairs: bool,
) -> Table:
    """Return Table 3 or 4."""
    rows: list[list[Cell]] = []
    for at, composition in enumerate(study.compositions(study.arms[0])):
        if (len(composition.domains) == 2) != pairs:
            continue
        reported = paper.find(_terms_of(composition))
        if reported is not None:
            rows.append(
                [
                    composition.name,
                    "paper",
                    reported.merged,
                    reported.summed,
                    f"{reported.change:+.2f} %"
                    + (
                        ""
                        if abs(reported.change - reported.recomputed) < 0.015
                        else f" (recomputed {reported.recomputed:+.2f} %)"
                    ),
                    reported.rms,
                    f"{paper.floor():.5f} or {paper.floor(paper.RANK):.4f}",
                ]
            )
        for kind, arms in kinds:
            there = [list(study.compositions(arm))[at] for arm in arms]
            merged, summed = ([losses(results, c)[i] for c in there] for i in (0, 1))
            rows.append(
                [
                    composition.name,
                    f"ours, {kind}",
                    perplexity_cell(merged),
                    perplexity_cell(summed),
                    change_cell(results.change(zip(merged, summed, strict=True))),
                    mean_cell(geometry_rms(results, c) for c in there),
                    next((floor for c in there if (floor := _floor(results, c))), None),
                ]
            )
    return Table(
        title,
        ["sum", "whose", "perplexity merged", "perplexity summed", "change", "RMS cosine", "floor"],
        rows,
    )


def losses(results: Results, composition: Composition) -> tuple[Losses | None, Losses | None]:
    """Return the losses of the joint adapter and of the sum on all their domains."""
    scored = results.study.scored(composition.domains)
    return (
        results.union(total(composition.merged), scored),
        results.union(total(*composition.summed), scored),
    )


def geometry_rms(results: Results, composition: Composition) -> float | None:
    """Return the RMS cosine of a sum of two; of three, the mean over their pairs."""
    found = [results.pair(pair) for pair in combinations(composition.summed, 2)]
    return mean_if_known(each.rms if each else None for each in found)


def _floor(results: Results, composition: Composition) -> float | None:
    found = [results.pair(pair) for pair in combinations(composition.summed, 2)]
    return mean_if_known(each.floor if each else None for each in found)


def _matrix(study: Study, results: Results) -> Table:
    """Return every model of the first arm on every domain."""
    arm, domains = study.arms[0], study.config.domains
    models: list[tuple[str, Terms]] = [("base", ())]
    models += [(f"adapter {domain}", total(spec)) for domain, spec in arm.fundamental.items()]
    models += [(f"adapter {'+'.join(union)}", total(spec)) for union, spec in arm.joint.items()]
    models += [(f"sum {c.name}", total(*c.summed)) for c in study.compositions(arm)]
    rows: list[list[Cell]] = [
        [
            name,
            *(perplexity_cell([results.loss(terms, domain)]) for domain in domains),
            perplexity_cell([results.union(terms, study.scored(domains))]),
        ]
        for name, terms in models
    ]
    own = [results.loss(total(arm.fundamental[domain]), domain) for domain in domains]
    rows.append(
        [
            "oracle router",
            *(perplexity_cell([each]) for each in own),
            perplexity_cell([results.router(arm.fundamental)]),
        ]
    )
    return Table(
        f"Every model on every domain: perplexity ({arm.name})", ["model", *domains, "all"], rows
    )


def pair_points(study: Study, results: Results) -> dict[str, dict[str, list[tuple[float, float]]]]:
    """Return {kind of arm: {arm: (RMS cosine, change in per cent) of each pair that is known}}."""
    points: dict[str, dict[str, list[tuple[float, float]]]] = {"shared A": {}, "different A": {}}
    for arm in study.arms:
        there = points["shared A" if arm.shared else "different A"].setdefault(arm.name, [])
        for composition in study.compositions(arm):
            if len(composition.domains) != 2:
                continue
            cosine = geometry_rms(results, composition)
            change = results.change([losses(results, composition)])
            if cosine is not None and change is not None:
                there.append((cosine, change.value))
    return points


def _fitted_lines(study: Study, results: Results) -> Table:
    """Return the lines of Figure 1: as printed, as its points give it, and ours."""
    slope, intercept = paper.printed_line()
    refitted = paper.line()
    rows: list[list[Cell]] = [
        ["paper, as printed", len(paper.pairs()), slope, intercept, None],
        [
            "paper, from its points",
            len(paper.pairs()),
            refitted.slope,
            refitted.intercept,
            refitted.r2,
        ],
    ]
    for kind, points in _points_by_kind(study, results).items():
        fitted = _line_of(points)
        if fitted:
            rows.append([f"ours, {kind}", len(points), fitted.slope, fitted.intercept, fitted.r2])
    return Table(
        "Figure 1: lines through pairs, change in % against RMS cosine",
        ["whose", "points", "slope", "intercept", "R2"],
        rows,
    )


def _points_by_kind(study: Study, results: Results) -> dict[str, list[tuple[float, float]]]:
    """Return the points that have a place: those of sums with a finite loss."""
    return {
        kind: [(x, y) for each in by_arm.values() for x, y in each if y < HUGE_PERCENT]
        for kind, by_arm in pair_points(study, results).items()
    }


def _line_of(points: Sequence[tuple[float, float]]) -> Line | None:
    """Return the line through points; through two it would say nothing."""
    return fit_line(*zip(*points, strict=True)) if len(points) > 2 else None


def _single_adapters(study: Study, results: Results) -> Table:
    """Return what each fundamental adapter of every shared A does on each domain."""
    arms = [arm for arm in study.arms if arm.shared]
    domains = study.config.domains
    rows: list[list[Cell]] = []
    for own in domains:
        cells: list[Cell] = [own]
        for domain in domains:
            base = results.loss((), domain)
            after = [results.loss(total(arm.fundamental[own]), domain) for arm in arms]
            cells += [
                perplexity_cell(after),
                change_cell(results.change((base, each) for each in after)),
            ]
        rows.append(cells)
    return Table(
        f"Single adapters against the base ({arms_of(len(arms))} of shared A)",
        ["adapter", *(c for d in domains for c in (f"perplexity on {d}", "against the base"))],
        rows,
    )


def _figure1(figure: Any, study: Study, results: Results) -> None:
    left, right = figure.subplots(1, 2)
    xs = [row.rms for row in paper.pairs() if row.rms is not None]
    left.scatter(xs, [row.change for row in paper.pairs()], color=INK, label="pairs", zorder=3)
    triples = [row for row in paper.triples() if row.rms is not None]
    left.scatter(
        [row.rms for row in triples],
        [row.recomputed for row in triples],
        color=ACCENT,
        marker="^",
        label="level-2 + other",
    )
    line = paper.line()
    ends = [0.045, 0.09]
    left.plot(
        ends,
        [line.at(x) for x in ends],
        color=INK,
        lw=1,
        label=f"{line.slope:.0f} x {line.intercept:+.0f}",
    )
    left.set(title="paper", xlabel="RMS cosine", ylabel="change of perplexity, %")
    legend(left)
    for (kind, points), color in zip(
        _points_by_kind(study, results).items(), (ACCENT, INK), strict=True
    ):
        if not points:
            continue
        x, y = zip(*points, strict=True)
        right.scatter(x, y, color=color, s=22, label=kind, zorder=3)
        fitted = _line_of(points)
        if fitted:
            # Many points, for a line is none on a logarithmic axis.
            ends = list(np.linspace(min(x), max(x)))
            label = f"{fitted.slope:.0f} x {fitted.intercept:+.0f}, R2 {fitted.r2:.2f}"
            right.plot(ends, [fitted.at(end) for end in ends], color=color, lw=1, label=label)
    mark_bounds(right, cosine_bounds(study, results))
    right.set(title=f"ours ({study.config.name})", xlabel="RMS cosine", xscale="log")
    plain_log(right.xaxis)
    figure.legend(
        *right.get_legend_handles_labels(), loc="outside lower center", ncols=4, fontsize=7
    )


def _heat_maps(
    figure: Any, study: Study, results: Results, kinds: Sequence[tuple[str, Sequence[Arm]]]
) -> None:
    names = [c.name for c in _sums_of_two(study, study.arms[0])]
    grid = figure.subplots(len(kinds), len(names), squeeze=False)
    for row, (kind, arms) in zip(grid, kinds, strict=True):
        found = [results.pair((c.summed[0], c.summed[1])) for c in _sums_of_two(study, arms[0])]
        # Each kind has a scale of its own: from different A cosines are many times smaller.
        limit = max((abs(v) for each in found if each for v in each.cosines.values()), default=1.0)
        image = None
        for axes, name, geometry in zip(row, names, found, strict=True):
            if geometry is None:
                axes.set_axis_off()
                continue
            values, types = layer_table(geometry.cosines)
            image = axes.imshow(values, cmap="RdBu_r", vmin=-limit, vmax=limit, aspect="auto")
            axes.set_xticks(range(len(types)), types, fontsize=5, rotation=90)
            axes.tick_params(axis="y", labelsize=6)
            whole_numbers(axes.yaxis)
            # In two lines, for names of three domains are wider than a map.
            axes.set_title(name.replace(" + ", "\n+ ") + f"\n{kind}", fontsize=7)
        row[0].set_ylabel("layer", fontsize=7)
        if image is not None:
            figure.colorbar(image, ax=list(row), label="cosine")


def _sums_of_two(study: Study, arm: Arm) -> list[Composition]:
    """Return the sums of two adapters: three pairs, and three of a level-2 adapter with another."""
    return [c for c in study.compositions(arm) if len(c.summed) == 2]


def layer_table(cosines: Mapping[str, float]) -> tuple[list[list[float]], list[str]]:
    """Return cosines as rows of layers and columns of module types, NaN where there is none."""
    types = sorted({module_type(module) for module in cosines})
    layers: dict[int, dict[str, float]] = {}
    for module, value in cosines.items():
        number = next((int(part) for part in module.split(".") if part.isdecimal()), 0)
        layers.setdefault(number, {})[module_type(module)] = value
    return [[layers[n].get(t, float("nan")) for t in types] for n in sorted(layers)], types


def _claims(study: Study, results: Results) -> list[Claim]:
    shared = [arm for arm in study.arms if arm.shared]
    by_arm = [[losses(results, c) for c in study.compositions(arm)] for arm in shared]
    names = [c.name for c in study.compositions(study.arms[0])]
    pairs = [results.change([arm[at] for arm in by_arm]) for at in range(3)]
    # The change of the triple over that of a pair, seed by seed.
    excess = [
        results.contrast(
            [
                [(1.0, arm[3][1]), (-1.0, arm[3][0]), (-1.0, arm[at][1]), (1.0, arm[at][0])]
                for arm in by_arm
            ]
        )
        for at in range(3)
    ]
    within = _rank_within(study, results)
    return [
        Claim(
            f"The sum of two adapters at weight 1 stays within {CLOSE_PERCENT:.0f} % of the "
            "perplexity of the jointly trained adapter, each of the three pairs (shared A; the "
            "paper: -9 to +28 %).",
            every(at_most(change, CLOSE_PERCENT) for change in pairs),
            _listed(names[:3], pairs),
            Plain(
                "two adapters summed at weight 1 come close to one adapter trained on both domains",
                "Two adapters summed at weight 1 come close to one adapter trained on both "
                f"domains: within {CLOSE_PERCENT:.0f} % of its perplexity for every pair.",
                "Two adapters summed at weight 1 fall behind one adapter trained on both domains, "
                f"by more than {CLOSE_PERCENT:.0f} % of its perplexity for at least one pair.",
            ),
        ),
        Claim(
            "The sum of three costs more than each sum of two: its change is above theirs, seed by "
            "seed (shared A; in the evidence the ratio of sum to joint adapter for three domains "
            "over that for two).",
            every(at_least(each, 0) for each in excess),
            _listed([f"three against {name}" for name in names[:3]], excess),
            Plain(
                "a sum of three loses more than a sum of two",
                "A sum of three loses more than any sum of two of them.",
                "A sum of three does not lose more than every sum of two of them.",
            ),
        ),
        Claim(
            "Among sums from one A, the pair with the larger RMS cosine loses more: rank "
            "correlation over pairs and seeds at least 0.8 (the paper's line through three points "
            "says so).",
            at_least(within, 0.8),
            f"rank correlation {interval_cell(within, 2)}, left out seed by seed" if within else "",
            Plain(
                "a larger cosine between two adapters goes with a larger loss of their sum, as "
                "the paper's line says",
                "Among sums from one A, a larger cosine between two adapters goes with a larger "
                "loss of their sum, as the paper's line says.",
                "Among sums from one A, a larger cosine between two adapters does not reliably go "
                "with a larger loss of their sum: the paper's line is not confirmed.",
            ),
        ),
    ]


def _listed(names: Sequence[str], intervals: Sequence[Interval | None]) -> str:
    return "; ".join(
        f"{name}: {change_cell(each)}"
        for name, each in zip(names, intervals, strict=True)
        if each is not None
    )


def _rank_within(study: Study, results: Results) -> Interval | None:
    """Return the rank correlation of cosine and change over all pairs and arms of shared A."""
    points = pair_points(study, results)["shared A"]
    if any(len(each) < len(study.pairs) for each in points.values()):
        return None

    def correlation(kept: frozenset[str]) -> float | None:
        there = [point for arm in kept for point in points[arm]]
        if len(there) < (LEAST_RANKED if kept < points.keys() else 1):
            return None
        found = rank_correlation(*zip(*there, strict=True))
        # Where nothing varies, nothing is ranked.
        return 0.0 if math.isnan(found) else found

    return jackknife(points, correlation, limits=(-1.0, 1.0))

"""The paper's own results: seven adapters, seven compositions, every model on every domain."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import combinations
from typing import Any

from benchmarks.report import Cell, Table
from benchmarks.study import paper
from benchmarks.study.cells import change_cell, mean_cell, perplexity_cell
from benchmarks.study.document import Claim, Picture, Section
from benchmarks.study.experiments.seeds import cosine_bounds
from benchmarks.study.palette import ACCENT, INK
from benchmarks.study.results import Results
from benchmarks.study.statistics import Losses, fit_line, rank_correlation
from benchmarks.study.study import Arm, Composition, Needs, Study, Terms, total
from benchmarks.study.ticks import legend, plain_log, whole_numbers
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
        "perplexity of the sum over that of the joint adapter trained on the same rows, on the "
        "test rows of all its domains together; in brackets the 95 % bootstrap interval over rows "
        "and seeds. The paper does not say whether its adapters started from one A, so both are "
        "shown: " + "; ".join(f"{name}, {len(arms)} arms" for name, arms in kinds) + ".",
    ]
    found.tables = [
        _tensors(study, results),
        _cosines_by_type(study, results, kinds),
        *_layers(study, results),
        _changes("Table 3: pairs", study, results, kinds, pairs=True),
        _changes("Table 4: triples", study, results, kinds, pairs=False),
        _matrix(study, results),
    ]
    found.pictures = [
        Picture("figure1", _FIGURE1, lambda figure: _figure1(figure, study, results), (9.5, 4.8)),
        Picture(
            "layers",
            "Cosine of two deltas, layer by layer (Tables 2 and 5), first arm of each kind.",
            lambda figure: _heat_maps(figure, study, results, kinds),
            (9.5, 2.6 * len(kinds) + 1.2),
        ),
    ]
    found.claims = _claims(study, results)
    return found


_FIGURE1 = (
    "Figure 1: RMS cosine against the change of perplexity, sum over joint adapter. Left the "
    "paper's three pairs with their line, and its triples, which the line was not fitted to; right "
    "ours, one point a pair and arm. Dotted the floor (random deltas), dashed the ceiling (one "
    "domain trained twice from different A)."
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
                ]
            )
        for kind, arms in kinds:
            there = [list(study.compositions(arm))[at] for arm in arms]
            found = [g for c in there if (g := results.pair((c.summed[0], c.summed[1])))]
            used |= {name for g in found for name in g.rms_by_type}
            rows.append(
                [
                    composition.name,
                    f"ours, {kind}",
                    *(mean_cell(g.rms_by_type.get(t) for g in found) for t in types),
                    mean_cell(g.rms for g in found),
                ]
            )
    keep = [at for at, name in enumerate(types) if name in used]
    return Table(
        "Tables 2 and 5: RMS cosine by module type",
        ["sum", "whose", *(types[at] for at in keep), "all"],
        [[*row[:2], *(row[2 + at] for at in keep), row[-1]] for row in rows],
    )


def _layers(study: Study, results: Results) -> list[Table]:
    """Return Tables 2 and 5 layer by layer: the first pair, and the level-2 sums."""
    compositions = [c for c in study.compositions(study.arms[0]) if len(c.summed) == 2]
    pair, level2 = compositions[:1], compositions[3:]
    tables = []
    for title, chosen in (("Table 2", pair), ("Table 5", level2)):
        columns: dict[str, dict[int, float]] = {}
        for composition in chosen:
            reported = paper.cosines(*_terms_of(composition))
            geometry = results.pair((composition.summed[0], composition.summed[1]))
            ours, types = layer_table(geometry.cosines) if geometry else ([], [])
            for whose, rows, names in (
                ("paper", reported or [], paper.MODULE_TYPES),
                ("ours", ours, types),
            ):
                for at, name in enumerate(names if rows else ()):
                    column = f"{composition.name}, {whose}: {name}"
                    columns[column] = {layer: row[at] for layer, row in enumerate(rows)}
        layers = sorted({layer for column in columns.values() for layer in column})
        tables.append(
            Table(
                f"{title}, layer by layer: cosines ({study.arms[0].name})",
                ["layer", *columns],
                [[layer, *(column.get(layer) for column in columns.values())] for layer in layers],
            )
        )
    return tables


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
                ]
            )
    return Table(
        title,
        ["sum", "whose", "perplexity merged", "perplexity summed", "change", "RMS cosine"],
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
    return mean_cell(each.rms if each else None for each in found)


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


def pair_points(study: Study, results: Results) -> dict[str, list[tuple[float, float]]]:
    """Return {kind of arm: (RMS cosine, change in per cent)} of the pair sums."""
    points: dict[str, list[tuple[float, float]]] = {"shared A": [], "different A": []}
    for arm in study.arms:
        for composition in study.compositions(arm):
            if len(composition.domains) != 2:
                continue
            cosine, change = (
                geometry_rms(results, composition),
                results.change([losses(results, composition)]),
            )
            if cosine is not None and change is not None:
                points["shared A" if arm.shared else "different A"].append((cosine, change.value))
    return points


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
        pair_points(study, results).items(), (INK, ACCENT), strict=True
    ):
        if not points:
            continue
        x, y = zip(*points, strict=True)
        right.scatter(x, y, color=color, s=22, label=kind, zorder=3)
        fitted = fit_line(x, y)
        if fitted and len(points) > 2:
            ends = [min(x), max(x)]
            label = f"{fitted.slope:.0f} x {fitted.intercept:+.0f}, R2 {fitted.r2:.2f}"
            right.plot(ends, [fitted.at(end) for end in ends], color=color, lw=1, label=label)
    bounds = cosine_bounds(study, results)
    if bounds.floor:
        right.axvline(bounds.floor, color="gray", ls=":", lw=1, label="floor")
    if bounds.ceiling:
        right.axvline(bounds.ceiling, color="gray", ls="--", lw=1, label="ceiling")
    right.set(title=f"ours ({study.config.name})", xlabel="RMS cosine", xscale="log")
    plain_log(right.xaxis)
    legend(right, fontsize=7, frameon=True, framealpha=0.8, edgecolor="none")


def _heat_maps(
    figure: Any, study: Study, results: Results, kinds: Sequence[tuple[str, Sequence[Arm]]]
) -> None:
    names = [c.name for c in study.compositions(study.arms[0]) if len(c.summed) == 2]
    grid = figure.subplots(len(kinds), len(names), squeeze=False)
    image = None
    for row, (kind, arms) in zip(grid, kinds, strict=True):
        two = [c for c in study.compositions(arms[0]) if len(c.summed) == 2]
        for axes, composition in zip(row, two, strict=True):
            geometry = results.pair((composition.summed[0], composition.summed[1]))
            if geometry is None:
                axes.set_axis_off()
                continue
            values, types = layer_table(geometry.cosines)
            image = axes.imshow(values, cmap="RdBu_r", vmin=-0.5, vmax=0.5, aspect="auto")
            axes.set_xticks(range(len(types)), [t.replace(".", "\n", 1) for t in types], fontsize=5)
            axes.tick_params(axis="y", labelsize=6)
            whole_numbers(axes.yaxis)
            axes.set_title(f"{composition.name}\n{kind}", fontsize=7)
    for row in grid:
        row[0].set_ylabel("layer", fontsize=7)
    if image is not None:
        figure.colorbar(image, ax=grid, shrink=0.8, label="cosine")


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
    changes = {}
    for at, composition in enumerate(study.compositions(study.arms[0])):
        there = [list(study.compositions(arm))[at] for arm in shared]
        change = results.change([losses(results, c) for c in there])
        if change is not None:
            changes[composition.name] = change
    names = [c.name for c in study.compositions(study.arms[0])]
    pair_changes = [changes[name] for name in names[:3] if name in changes]
    triple = changes.get(names[3])
    close: bool | None = None
    if len(pair_changes) == 3:
        close = all(change.high <= CLOSE_PERCENT for change in pair_changes)
    points = [point for each in pair_points(study, results).values() for point in each]
    shared_points = pair_points(study, results)["shared A"]
    within = rank_correlation(*zip(*shared_points, strict=True)) if len(shared_points) > 3 else None
    overall = rank_correlation(*zip(*points, strict=True)) if len(points) > 3 else None
    return [
        Claim(
            f"The sum of two adapters at weight 1 stays within {CLOSE_PERCENT:.0f} % of the "
            "perplexity of the jointly trained adapter (upper ends of all three intervals, shared "
            "A; the paper: -9 to +28 %).",
            close,
            "; ".join(f"{n}: {change_cell(changes[n])}" for n in names[:3] if n in changes),
        ),
        Claim(
            "The sum of three costs more than each sum of two (shared A).",
            None
            if triple is None or len(pair_changes) < 3
            else all(triple.value > change.value for change in pair_changes),
            "" if triple is None else f"three: {change_cell(triple)}",
        ),
        Claim(
            "Among sums from one A, the pair with the larger RMS cosine loses more (rank "
            "correlation over pairs and seeds at least 0.8, as the paper's line says).",
            None if within is None else within >= 0.8,
            ""
            if within is None or overall is None
            else f"rank correlation {within:.2f} with a shared A, {overall:.2f} over all arms",
        ),
    ]

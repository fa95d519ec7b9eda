"""The template: how much of the overlap is the common way of writing questions and answers."""

from __future__ import annotations

from benchmarks.report import Cell, Table
from benchmarks.study.cells import change_cell, covered, mean_cell, perplexity_cell
from benchmarks.study.document import Claim, Plain, Section
from benchmarks.study.experiments.seeds import all_measured, rms_change
from benchmarks.study.results import Results
from benchmarks.study.statistics import Interval, Losses
from benchmarks.study.study import AdapterSpec, Needs, Pair, Study, total
from benchmarks.study.verdict import at_most, every


def own_templates(study: Study) -> dict[str, str]:
    """Return {domain: its own template}, of the three domains."""
    config = study.config.templates
    own = config.own if config else {}
    return {domain: own.get(domain, study.template) for domain in study.config.domains}


def adapters(study: Study, seed: int) -> dict[str, AdapterSpec]:
    """Return the fundamental adapters, each trained in its own template, from one A."""
    own = own_templates(study)
    return {domain: study.fundamental(domain, seed, template=own[domain]) for domain in own}


def needs(study: Study) -> Needs:
    """Ask for single adapters, pairs and the triple on rows in the templates of their domains."""
    wanted = Needs()
    own = own_templates(study)
    for seed in study.config.templates.seeds if study.config.templates else ():
        there = adapters(study, seed)
        common = {domain: study.fundamental(domain, seed) for domain in own}
        for specs, templates in ((there, own), (common, dict.fromkeys(own, study.template))):
            for domain, spec in specs.items():
                wanted.score(total(spec), [(domain, templates[domain])])
            for union in study.unions:
                terms = total(*(specs[domain] for domain in union))
                wanted.score(terms, [(domain, templates[domain]) for domain in union])
            wanted.cosines(specs.values())
    return wanted


def section(study: Study, results: Results) -> Section:
    """Tell what the common template does to cosine and interference."""
    found = Section("templates", "A template of its own for each domain")
    config = study.config.templates
    seeds = config.seeds if config else ()
    own = own_templates(study)
    common = dict.fromkeys(own, study.template)
    found.text = [
        "All domains share one way of writing question and answer, which every adapter has to "
        "learn. Here each domain is trained and scored in a template of its own. Interference is "
        "the sum's perplexity over that of the oracle router, in the same templates. Own "
        "templates: "
        + "; ".join(f"{domain} {template!r}" for domain, template in own.items())
        + ". A template's own tokens are foretold almost for free once it is learned, so losses a "
        "token in templates of different length are not quite the same measure; what is compared "
        f"is the sum with its router, both in one template. {covered(len(seeds))}",
    ]
    rows: list[list[Cell]] = []
    pairs: dict[str, list[Pair]] = {"common": [], "own": []}
    changes: list[Interval | None] = []
    for union in study.unions:
        by_name: dict[str, list[tuple[Losses | None, Losses | None]]] = {}
        for name, templates in (("common", common), ("own", own)):
            routers, sums = [], []
            there: list[Pair] = []
            for seed in seeds:
                specs = (
                    adapters(study, seed)
                    if name == "own"
                    else {domain: study.fundamental(domain, seed) for domain in own}
                )
                chosen = {domain: specs[domain] for domain in union}
                routers.append(results.router(chosen, templates))
                sums.append(
                    results.union(
                        total(*chosen.values()), [(domain, templates[domain]) for domain in union]
                    )
                )
                if len(union) == 2:
                    there.append((chosen[union[0]], chosen[union[1]]))
            pairs[name] += there
            by_name[name] = list(zip(routers, sums, strict=True))
            found_pairs = [results.pair(pair) for pair in there]
            rows.append(
                [
                    " + ".join(union),
                    name,
                    mean_cell(each.rms if each else None for each in found_pairs),
                    next((each.floor for each in found_pairs if each), None),
                    perplexity_cell(routers),
                    perplexity_cell(sums),
                    change_cell(results.change(by_name[name])),
                ]
            )
        changes.append(
            results.contrast(
                [
                    [(1.0, own_sum), (-1.0, own_router), (-1.0, its_sum), (1.0, its_router)]
                    for (own_router, own_sum), (its_router, its_sum) in zip(
                        by_name["own"], by_name["common"], strict=True
                    )
                ]
            )
        )
    found.tables = [
        Table(
            "Common and own templates, adapters from one A",
            [
                "sum",
                "templates",
                "RMS cosine",
                "floor, same A",
                "perplexity, oracle router",
                "perplexity, sum",
                "interference",
            ],
            rows,
        )
    ]
    common_pairs, own_pairs = (all_measured(results, pairs[name]) for name in ("common", "own"))
    change = rms_change(common_pairs, own_pairs) if common_pairs and own_pairs else None
    found.claims = [
        Claim(
            "The common template makes a good part of the overlap: with own templates the RMS "
            "cosine is at least 25 % smaller.",
            at_most(change, -25),
            change_cell(change) or "",
            Plain(
                "a good part of the overlap is the common way of writing questions and answers",
                "A good part of the overlap (RMS cosine) is the common way of writing questions "
                "and answers.",
                "The common way of writing questions and answers makes less than a quarter of the "
                "overlap (RMS cosine).",
            ),
        ),
        Claim(
            "Own templates lower the interference: the perplexity of each of the four sums over "
            "that of its oracle router by at least 10 %.",
            every(at_most(each, -10) for each in changes),
            "; ".join(
                f"{' + '.join(union)}: {change_cell(each)}"
                for union, each in zip(study.unions, changes, strict=True)
                if each is not None
            ),
            Plain(
                "templates of their own make sums lose less against the oracle router",
                "With templates of their own sums lose less against the oracle router, by at least "
                "10 % each.",
                "Templates of their own lower what a sum loses against the oracle router by less "
                "than 10 %, or not at all, for at least one sum.",
            ),
        ),
    ]
    return found

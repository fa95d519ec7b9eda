"""Block after block: what one more summed adapter costs those that are there."""

from __future__ import annotations

import math
from typing import Any

from benchmarks.report import Cell, Table
from benchmarks.study.cells import change_cell, covered, perplexity_cell
from benchmarks.study.config import Blocks
from benchmarks.study.document import Claim, Picture, Plain, Section
from benchmarks.study.experiments.lambdas import best_weight, weights_cell
from benchmarks.study.palette import ACCENT, INK, THIRD
from benchmarks.study.results import Results
from benchmarks.study.statistics import Losses, join
from benchmarks.study.study import Needs, Study, Terms, total
from benchmarks.study.ticks import legend, plain_log, whole_numbers
from benchmarks.study.verdict import at_least, at_most


def weights(blocks: Blocks, count: int) -> list[float]:
    """Return the weights tried for a sum of so many adapters."""
    return sorted({*blocks.grid, 1.0, 1 / count})


def terms(study: Study, blocks: Blocks, count: int, weight: float, seed: int) -> Terms:
    """Return the sum of the first `count` domains' adapters."""
    specs = (study.fundamental(domain, seed) for domain in blocks.order[:count])
    return total(*specs, weight=weight)


def needs(study: Study) -> Needs:
    """Ask for every number of blocks and every weight, and for each adapter alone on its rows."""
    wanted = Needs()
    blocks = study.config.blocks
    if blocks is None:
        return wanted
    for seed in blocks.seeds:
        for domain in blocks.order:
            wanted.score((), study.scored([domain]))
            wanted.score(total(study.fundamental(domain, seed)), study.scored([domain]))
        for count in range(1, len(blocks.order) + 1):
            scored = study.scored(blocks.order[:count])
            for weight in weights(blocks, count):
                model = terms(study, blocks, count, weight, seed)
                wanted.score(model, scored, "validation")
                wanted.score(model, scored)
    return wanted


def section(study: Study, results: Results) -> Section:
    """Tell how far the sum of ever more blocks falls behind."""
    found = Section("blocks", "One block after the other")
    blocks = study.config.blocks
    if blocks is None:
        return found
    counts = range(1, len(blocks.order) + 1)
    found.text = [
        "Adapters of one A are summed in the order "
        + ", ".join(blocks.order)
        + ". Perplexity on the test rows of all domains that are in, at weight 1, at 1/j, and at "
        "lambda* (chosen on validation rows), and how far it is above that of the oracle router. "
        "(edge): lambda* is the least or the largest weight that was tried, and the true best may "
        f"lie beyond. One order of domains. {covered(len(blocks.seeds))}",
    ]
    rows: list[list[Cell]] = []
    for count in counts:
        by_name = _by_name(study, results, blocks, count)
        router = _routers(study, results, blocks, count)
        rows.append(
            [
                count,
                blocks.order[count - 1],
                perplexity_cell(_base(results, blocks, count)),
                perplexity_cell(router),
                *(perplexity_cell(losses) for losses in by_name.values()),
                weights_cell(
                    (_best(study, results, blocks, count, seed) for seed in blocks.seeds),
                    weights(blocks, count),
                ),
                change_cell(results.change(zip(router, by_name["lambda*"], strict=True))),
            ]
        )
    found.tables = [
        Table(
            "Number of blocks: perplexity on their domains",
            [
                "blocks",
                "added",
                "base",
                "oracle router",
                "weight 1",
                "weight 1/j",
                "lambda*",
                "which",
                "lambda* over the router",
            ],
            rows,
        )
    ]
    found.pictures = [
        Picture(
            "blocks",
            "Perplexity of the sum over that of the oracle router, against the number of blocks.",
            lambda figure: _draw(figure, study, results, blocks),
            (7.0, 3.8),
        )
    ]
    last = len(blocks.order)
    at_last = _by_name(study, results, blocks, last)
    base = _base(results, blocks, last)
    against_base = {
        name: results.change(zip(base * len(losses), losses, strict=True))
        for name, losses in at_last.items()
    }
    one, best = against_base["weight 1"], against_base["lambda*"]
    found.claims = [
        Claim(
            f"At weight 1 the sum of {last} adapters is worse than the base on their own domains.",
            at_least(one, 0),
            change_cell(one) or "",
            Plain(
                "many adapters at weight 1 do more harm than good",
                f"The sum of {last} adapters at weight 1 is worse than the base on their own "
                "domains.",
                f"The sum of {last} adapters at weight 1 is still better than the base.",
            ),
        ),
        Claim(
            f"At lambda* the sum of {last} adapters is still better than the base.",
            at_most(best, 0),
            change_cell(best) or "",
            Plain(
                "many adapters at the best weight are better than none",
                f"At the best weight the sum of {last} adapters is better than the base.",
                f"Even at the best weight the sum of {last} adapters is worse than the base.",
            ),
        ),
    ]
    return found


def _by_name(
    study: Study, results: Results, blocks: Blocks, count: int
) -> dict[str, list[Losses | None]]:
    """Return {how it is weighted: losses, one a seed}."""
    scored = study.scored(blocks.order[:count])

    def at(weight: float | None, seed: int) -> Losses | None:
        if weight is None:
            return None
        return results.union(terms(study, blocks, count, weight, seed), scored)

    return {
        "weight 1": [at(1.0, seed) for seed in blocks.seeds],
        "weight 1/j": [at(1 / count, seed) for seed in blocks.seeds],
        "lambda*": [at(_best(study, results, blocks, count, seed), seed) for seed in blocks.seeds],
    }


def _best(study: Study, results: Results, blocks: Blocks, count: int, seed: int) -> float | None:
    candidates = {w: terms(study, blocks, count, w, seed) for w in weights(blocks, count)}
    return best_weight(results, candidates, blocks.order[:count])


def _base(results: Results, blocks: Blocks, count: int) -> list[Losses | None]:
    return [results.union((), results.study.scored(blocks.order[:count]))]


def _routers(study: Study, results: Results, blocks: Blocks, count: int) -> list[Losses | None]:
    found = []
    for seed in blocks.seeds:
        alone = [
            results.loss(total(study.fundamental(domain, seed)), domain)
            for domain in blocks.order[:count]
        ]
        known = [each for each in alone if each is not None]
        found.append(join(known) if len(known) == count else None)
    return found


def _draw(figure: Any, study: Study, results: Results, blocks: Blocks) -> None:
    axes = figure.subplots()
    for name, color in (("weight 1", ACCENT), ("weight 1/j", THIRD), ("lambda*", INK)):
        points = []
        for count in range(1, len(blocks.order) + 1):
            router = _routers(study, results, blocks, count)
            losses = _by_name(study, results, blocks, count)[name]
            change = results.change(zip(router, losses, strict=True))
            if change:
                points.append((count, change))
        if points:
            ratio = [1 + change.value / 100 for _, change in points]
            low = [1 + change.low / 100 for _, change in points]
            high = [1 + change.high / 100 for _, change in points]
            axes.plot([count for count, _ in points], ratio, "o-", color=color, ms=4, label=name)
            axes.fill_between([c for c, _ in points], low, high, color=color, alpha=0.15, lw=0)
    base = [
        (count, b.mean - r.mean)
        for count in range(1, len(blocks.order) + 1)
        for b in _base(results, blocks, count)
        for r in _routers(study, results, blocks, count)[:1]
        if b and r
    ]
    if base:
        axes.plot(
            [c for c, _ in base], [math.exp(d) for _, d in base], ":", color="gray", label="base"
        )
    axes.axhline(1, color="gray", lw=0.8)
    axes.set(xlabel="blocks in the sum", ylabel="perplexity over the router's", yscale="log")
    plain_log(axes.yaxis)
    whole_numbers(axes.xaxis)
    legend(axes)

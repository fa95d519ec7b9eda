"""Joint models with as many parameters, steps or tokens as the adapters of a sum have together."""

from __future__ import annotations

from benchmarks.report import Cell, Table
from benchmarks.study.cells import change_cell, perplexity_cell
from benchmarks.study.document import Claim, Section
from benchmarks.study.results import Results
from benchmarks.study.statistics import Interval, Losses
from benchmarks.study.study import AdapterSpec, Budget, Needs, Study, total


def ranks(study: Study) -> list[int]:
    """Return the ranks of the joint models."""
    controls = study.config.controls
    more = controls.ranks if controls else ()
    return sorted({study.config.training.rank, *more})


def controls(study: Study) -> dict[tuple[tuple[str, ...], int, Budget, int], AdapterSpec]:
    """Return {(domains, rank, budget, seed): joint adapter}."""
    config = study.config.controls
    if config is None:
        return {}
    return {
        (union, rank, budget, seed): study.joint(union, seed, rank=rank, budget=budget)
        for union in study.unions
        for rank in ranks(study)
        for budget in config.budgets
        for seed in config.seeds
    }


def needs(study: Study) -> Needs:
    """Ask for every joint model on the rows of its domains."""
    wanted = Needs()
    for (union, *_), spec in controls(study).items():
        wanted.score(total(spec), study.scored(union))
    return wanted


def section(study: Study, results: Results) -> Section:
    """Compare sums with joint models of matched rank, steps and tokens."""
    found = Section("controls", "Matched joint models")
    config = study.config.controls
    seeds = config.seeds if config else ()
    found.text = [
        "A sum of two adapters has rank 8, a sum of three rank 12; the paper compares it with a "
        "joint adapter of rank 4. Here joint adapters of several ranks (alpha / rank kept) and two "
        "budgets: tokens, as many rows as the summed adapters saw together, which is the union; "
        "steps, as many rows, and so steps, as one of them saw. Seeds: "
        + ", ".join(map(str, seeds))
        + ".",
    ]
    arms = {arm.seed: arm for arm in study.arms if arm.shared}
    rows: list[list[Cell]] = []
    for union in study.unions:
        sums = [
            results.union(
                total(*(arms[seed].fundamental[domain] for domain in union)), study.scored(union)
            )
            for seed in seeds
        ]
        rows.append(
            [
                " + ".join(union),
                "sum of rank-4 adapters, weight 1",
                None,
                perplexity_cell(sums),
                None,
                None,
            ]
        )
        plain = joint_losses(study, results, union, study.config.training.rank, "tokens")
        for budget in config.budgets if config else ():
            for rank in ranks(study):
                joint = joint_losses(study, results, union, rank, budget)
                rows.append(
                    [
                        " + ".join(union),
                        f"joint, equal {budget}",
                        rank,
                        perplexity_cell(joint),
                        change_cell(results.change(zip(plain, joint, strict=True)))
                        if (rank, budget) != (study.config.training.rank, "tokens")
                        else None,
                        change_cell(results.change(zip(joint, sums, strict=True))),
                    ]
                )
    found.tables = [
        Table(
            "Sums of adapters with one A against joint adapters",
            [
                "domains",
                "model",
                "rank",
                "perplexity",
                "against the paper's control",
                "sum against it",
            ],
            rows,
        )
    ]
    found.claims = _claims(study, results)
    return found


def joint_losses(
    study: Study, results: Results, union: tuple[str, ...], rank: int, budget: Budget
) -> list[Losses | None]:
    """Return a joint model's losses on its domains, one a seed."""
    config = study.config.controls
    return [
        results.union(
            total(study.joint(union, seed, rank=rank, budget=budget)), study.scored(union)
        )
        for seed in (config.seeds if config else ())
    ]


def _claims(study: Study, results: Results) -> list[Claim]:
    union, low, high = study.config.domains, ranks(study)[0], ranks(study)[-1]

    def change(to_rank: int, budget: Budget) -> Interval | None:
        plain = joint_losses(study, results, union, low, "tokens")
        return results.change(
            zip(plain, joint_losses(study, results, union, to_rank, budget), strict=True)
        )

    config = study.config.controls
    claims = []
    if high > low:
        wider = change(high, "tokens")
        claims.append(
            Claim(
                f"The paper's control is handicapped by its rank: a joint adapter of rank {high} "
                f"on all three domains is at least 5 % better than one of rank {low} (upper end of "
                "the interval).",
                wider.high <= -5 if wider else None,
                change_cell(wider) or "",
            )
        )
    if config and "steps" in config.budgets:
        fewer = change(low, "steps")
        claims.append(
            Claim(
                "The joint adapter owes part of its lead to seeing the union: with the steps of "
                "one adapter it is at least 5 % worse (lower end of the interval).",
                fewer.low >= 5 if fewer else None,
                change_cell(fewer) or "",
            )
        )
    return claims

"""Joint models with as many parameters, steps or tokens as the adapters of a sum have together."""

from __future__ import annotations

from benchmarks.report import Cell, Table
from benchmarks.study.cells import change_cell, covered, perplexity_cell
from benchmarks.study.document import Claim, Plain, Section
from benchmarks.study.results import Results
from benchmarks.study.statistics import Interval, Losses
from benchmarks.study.study import AdapterSpec, Budget, Needs, Study, total
from benchmarks.study.verdict import at_least, at_most


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
    """Ask for every joint model on the rows of its domains, the paper's too, and for the sums."""
    wanted = Needs()
    for (union, *_), spec in controls(study).items():
        wanted.score(total(spec), study.scored(union))
    for seed in study.config.controls.seeds if study.config.controls else ():
        for union in study.unions:
            scored = study.scored(union)
            wanted.score(total(study.joint(union, seed)), scored)
            wanted.score(total(study.joint(union, seed, budget="tokens")), scored)
            wanted.score(total(*(study.fundamental(d, seed) for d in union)), scored)
    return wanted


def section(study: Study, results: Results) -> Section:
    """Compare sums with joint models of matched rank, steps and tokens."""
    found = Section("controls", "Matched joint models")
    config = study.config.controls
    seeds = config.seeds if config else ()
    rank = study.config.training.rank
    budgets = {
        "tokens": "equal tokens, as many visits to each domain's rows as its own adapter pays",
        "steps": "equal steps, as many as one of the summed adapters takes on average; this takes "
        "away distinct rows and steps at once, and cannot tell one from the other",
    }
    found.text = [
        f"A sum of two adapters of rank {rank} has rank up to {2 * rank}, a sum of three up to "
        f"{3 * rank}; the paper compares it with a joint adapter of rank {rank}. Here joint "
        f"adapters have rank {', '.join(map(str, ranks(study)))}, alpha / rank kept. Budgets: "
        + "; ".join(budgets[budget] for budget in (config.budgets if config else ()))
        + f". {covered(len(seeds))}",
    ]
    rows: list[list[Cell]] = []
    for union in study.unions:
        sums = [
            results.union(
                total(*(study.fundamental(domain, seed) for domain in union)), study.scored(union)
            )
            for seed in seeds
        ]
        rows.append(
            [
                " + ".join(union),
                f"sum of rank-{rank} adapters, weight 1",
                None,
                perplexity_cell(sums),
                None,
                None,
            ]
        )
        plain = joint_losses(study, results, union, rank, "tokens")
        if any(study.joint(union, s) != study.joint(union, s, budget="tokens") for s in seeds):
            # Tuned apart from the adapters that are summed, it has another budget than they.
            papers = joint_losses(study, results, union, rank, None)
            rows.append(
                [
                    " + ".join(union),
                    "joint, as tuned",
                    rank,
                    perplexity_cell(papers),
                    change_cell(results.change(zip(plain, papers, strict=True))),
                    change_cell(results.change(zip(papers, sums, strict=True))),
                ]
            )
        for budget in config.budgets if config else ():
            for wide in ranks(study):
                joint = joint_losses(study, results, union, wide, budget)
                rows.append(
                    [
                        " + ".join(union),
                        f"joint, equal {budget}",
                        wide,
                        perplexity_cell(joint),
                        change_cell(results.change(zip(plain, joint, strict=True)))
                        if (wide, budget) != (rank, "tokens")
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
                f"against rank {rank}, equal tokens",
                "sum against it",
            ],
            rows,
        )
    ]
    found.claims = _claims(study, results)
    return found


def joint_losses(
    study: Study, results: Results, union: tuple[str, ...], rank: int, budget: Budget | None
) -> list[Losses | None]:
    """Return a joint model's losses on its domains, one a seed; without a budget the paper's."""
    config = study.config.controls
    return [
        results.union(
            total(study.joint(union, seed, rank=rank, budget=budget)), study.scored(union)
        )
        for seed in (config.seeds if config else ())
    ]


def _claims(study: Study, results: Results) -> list[Claim]:
    union, rank, widest = study.config.domains, study.config.training.rank, ranks(study)[-1]
    plain = joint_losses(study, results, union, rank, "tokens")

    def change(to_rank: int, budget: Budget) -> Interval | None:
        joint = joint_losses(study, results, union, to_rank, budget)
        return results.change(zip(plain, joint, strict=True))

    config = study.config.controls
    claims = []
    if widest > rank and config and "tokens" in config.budgets:
        wider = change(widest, "tokens")
        claims.append(
            Claim(
                "The paper's control is handicapped by its rank: on all three domains a joint "
                f"adapter of rank {widest} is at least 5 % of perplexity below one of rank {rank}.",
                at_most(wider, -5),
                change_cell(wider) or "",
                Plain(
                    "the paper's joint adapter is handicapped by its rank",
                    "The paper's joint adapter is handicapped by its rank: with rank "
                    f"{widest} it would be better still.",
                    f"The paper's joint adapter is not handicapped by its rank: rank {widest} "
                    "gains it less than 5 %.",
                ),
            )
        )
    if config and "steps" in config.budgets:
        fewer = change(rank, "steps")
        claims.append(
            Claim(
                "Fewer rows and steps, as many as one adapter has, cost the joint adapter of all "
                "three domains at least 5 % of perplexity.",
                at_least(fewer, 5),
                change_cell(fewer) or "",
            )
        )
    return claims

"""The first page: what was asked, what holds, what was not run."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass

from benchmarks.report import Cell, Table
from benchmarks.study import paper
from benchmarks.study.document import Section
from benchmarks.study.plan import EXPERIMENTS, TUNING, wanted
from benchmarks.study.run import to_do
from benchmarks.study.steps import duration
from benchmarks.study.study import Study
from benchmarks.study.workspace import Workspace

TITLE = "Merged training against summed adapters"
# What other sections will hold one day.
LATER = (
    "other merge methods on the same adapters and weights",
    "rank, alpha and learning rate apart from each other",
    "subspace angles as predictors",
)
_PAPER_CONFIG = "paper"


@dataclass(frozen=True)
class Front:
    """The first page.

    Attributes:
        lead: What this is, in sentences.
        not_run: One line for each thing that is not in it.
        claims: Every claim with its verdict.
        machines: Where stages ran, with versions and commit.
        options: The config, as JSON.
    """

    title: str
    lead: list[str]
    not_run: list[str]
    claims: Table
    errors: list[str]
    times: Table
    machines: list[str]
    options: str


def front(study: Study, sections: Sequence[Section], workspace: Workspace) -> Front:
    """Put the first page together."""
    config = study.config
    claims: list[list[Cell]] = [
        [claim.verdict, claim.text, claim.evidence, section.title]
        for section in sections
        for claim in section.claims
    ]
    held = sum(row[0] == "holds" for row in claims)
    decided = sum(row[0] != "not run" for row in claims)
    return Front(
        title=f"{TITLE}: {config.name}",
        lead=[
            config.description,
            f"Base {study.inputs.base} ({study.inputs.parameters / 1e6:.1f} million parameters, "
            f"digest {study.inputs.base_digest[:12]}); domains "
            + ", ".join(
                f"{domain} ({each.name}, {each.rows['train']:,} training rows, sha256 "
                f"{each.sha256[:12]})"
                for domain, each in study.inputs.files.items()
            )
            + ".",
            f"Adapters of rank {config.training.rank}, alpha {config.training.alpha:g}; losses in "
            f"{config.evaluation.dtype} on weights folded by the server's own code; "
            f"{config.evaluation.resamples} bootstrap resamples, intervals at 95 %. Loss is a mean "
            "over tokens, perplexity its exponential.",
            f"Of {decided} claims that could be decided {held} hold and {decided - held} do not. "
            "Each has its threshold in its sentence, and its verdict follows from the results.",
        ],
        not_run=not_run(study, workspace),
        claims=Table(
            "What holds and what does not", ["verdict", "claim", "evidence", "section"], claims
        ),
        errors=paper.errors(),
        times=_times(workspace),
        machines=list(
            dict.fromkeys(str(each["machine"]) for each in workspace.stages() if "machine" in each)
        ),
        options=json.dumps(asdict(config), indent=1),
    )


def not_run(study: Study, workspace: Workspace) -> list[str]:
    """Return what a reader might expect and will not find."""
    config = study.config
    lines = []
    if config.name != _PAPER_CONFIG:
        lines.append(
            f"The paper's own setting: the base here is {study.inputs.base}. `--config paper` "
            "takes GPT-2's weights from the Hub and was not run. So absolute perplexities are not "
            "to be compared with the paper's."
        )
    asked = wanted(config)
    for experiment in asked:
        needs = experiment.needs(Study(config, study.inputs) if experiment is TUNING else study)
        todo = to_do(study, needs, workspace)
        if not todo:
            continue
        lacking = [
            f"{len(missing)} of {len(whole)} {name}"
            for missing, whole, name in (
                (todo.scorings, needs.scorings, "losses"),
                (todo.pairs, needs.pairs, "cosines"),
                (todo.activations, needs.activations, "activation-weighted cosines"),
                (todo.findings, needs.findings, "measurements"),
            )
            if missing
        ]
        lines.append(f"{experiment.title}: {', '.join(lacking)} are missing (cells with -).")
    lines += [
        f"{experiment.title}: not in config {config.name}."
        for experiment in (*EXPERIMENTS, TUNING)
        if experiment not in asked
    ]
    return [*lines, f"Not part of this study yet: {'; '.join(LATER)}."]


def _times(workspace: Workspace) -> Table:
    """Return wall time and memory of the stages, by experiment."""
    rows: dict[tuple[str, str], list[float]] = {}
    for each in workspace.stages():
        row = rows.setdefault((str(each["experiment"]), str(each["stage"])), [0.0, 0.0, 0.0])
        row[0] += float(str(each["seconds"]))
        row[1] += float(str(each.get("tokens", 0)))
        row[2] = max(row[2], float(str(each["peak_rss_mib"])))
    cells: list[list[Cell]] = [
        [
            experiment,
            stage,
            duration(seconds),
            f"{tokens / 1e3:,.0f} k" if tokens else None,
            f"{tokens / seconds:,.0f}" if tokens and seconds else None,
            f"{peak:,.0f}",
        ]
        for (experiment, stage), (seconds, tokens, peak) in rows.items()
    ]
    cells.append(["all", "", duration(sum(row[0] for row in rows.values())), None, None, None])
    return Table(
        "Wall time",
        ["experiment", "stage", "time", "tokens", "tokens/s", "peak memory of the process, MiB"],
        cells,
    )

"""The first page: what was asked, what came out, what was not run."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass

from benchmarks.report import Cell, Table
from benchmarks.study import paper
from benchmarks.study.choices import choices
from benchmarks.study.document import Claim, Section
from benchmarks.study.glossary import glossary
from benchmarks.study.plan import EXPERIMENTS, TUNING, needed_keys, needs_of, reportable, wanted
from benchmarks.study.run import to_do
from benchmarks.study.steps import duration
from benchmarks.study.study import AdapterSpec, Study
from benchmarks.study.verdict import Verdict
from benchmarks.study.workspace import Workspace

TITLE = "Merged training against summed adapters"
# What other sections will hold one day.
LATER = (
    "other merge methods on the same adapters and weights",
    "rank, alpha and learning rate apart from each other",
    "subspace angles as predictors",
)
_PAPER_CONFIG = "paper"
# In what `Machine.caption` says.
_COMMIT = re.compile(r"commit (\w+(?: \(changed\))?)")


@dataclass(frozen=True)
class Front:
    """The first page.

    Attributes:
        lead: What this is, in sentences.
        summary: What came out, in plain sentences that follow from the claims.
        words: (word, meaning) of what the report takes for granted.
        choices: What the paper leaves open and was done here, a line each.
        not_run: One line for each thing that is not in it.
        claims: Every claim with its verdict.
        machines: Where stages ran, with versions and commit.
        options: The config, as JSON.
    """

    title: str
    lead: list[str]
    summary: list[str]
    words: list[tuple[str, str]]
    choices: list[str]
    not_run: list[str]
    claims: Table
    errors: list[str]
    times: Table
    machines: list[str]
    options: str


def front(study: Study, sections: Sequence[Section], workspace: Workspace) -> Front:
    """Put the first page together."""
    config = study.config
    claims = [(claim, section) for section in sections for claim in section.claims]
    stages = workspace.stages(needed_keys(study, reportable(study, workspace)))
    return Front(
        title=f"{TITLE}: {config.name}",
        lead=[
            config.description,
            f"Base {study.inputs.base} ({study.inputs.parameters / 1e6:.1f} million parameters, "
            f"digest {study.inputs.base_digest[:12]}); domains "
            + ", ".join(
                f"{domain} ({each.name}, {study.rows(domain):,} training rows of "
                f"{each.rows['train']:,}, sha256 {each.sha256[:12]})"
                for domain, each in study.inputs.files.items()
            )
            + "."
            + (f" Flags: {' '.join(study.inputs.overrides)}." if study.inputs.overrides else ""),
            f"Adapters of rank {config.training.rank}, alpha {config.training.alpha:g}; losses in "
            f"{config.evaluation.dtype} on weights folded by the server's own code; "
            f"{config.evaluation.resamples} bootstrap resamples, intervals at 95 %. Loss is a mean "
            "over tokens, perplexity its exponential; a perplexity of several seeds is their "
            "geometric mean.",
        ],
        summary=summary([claim for claim, _ in claims]),
        words=glossary(config),
        choices=choices(study, workspace.adapters.get(study.adapter_key(_first(study)))),
        not_run=not_run(study, workspace),
        claims=Table(
            "What holds, what does not, and what is not decided",
            ["verdict", "claim", "evidence", "section"],
            [[c.verdict.value, c.text, c.evidence, section.title] for c, section in claims],
        ),
        errors=paper.errors(),
        times=_times(stages),
        machines=list(dict.fromkeys(str(each["machine"]) for each in stages)),
        options=json.dumps(asdict(config), indent=1),
    )


def _first(study: Study) -> AdapterSpec:
    """Return the first adapter that the study trains."""
    return next(iter(study.arms[0].fundamental.values()))


def summary(claims: Sequence[Claim]) -> list[str]:
    """Return what came out in plain sentences, and how many claims came out how."""
    plain = [(claim.verdict, claim.plain) for claim in claims if claim.plain is not None]
    paragraphs = [
        " ".join(
            said.yes if verdict is Verdict.HOLDS else said.no
            for verdict, said in plain
            if verdict in (Verdict.HOLDS, Verdict.FAILS)
        )
    ]
    for undecided, begin in (
        (Verdict.OPEN, "Not decided is"),
        (Verdict.NOT_RUN, "Not measured, or not in full, is"),
    ):
        questions = [f"whether {said.question}" for verdict, said in plain if verdict is undecided]
        paragraphs.append(f"{begin} {'; '.join(questions)}." if questions else "")
    counts = {verdict: sum(claim.verdict is verdict for claim in claims) for verdict in Verdict}
    return [
        *filter(None, paragraphs),
        f"Of {len(claims)} claims {counts[Verdict.HOLDS]} hold, {counts[Verdict.FAILS]} do not, "
        f"{counts[Verdict.OPEN]} are not decided (the threshold lies within the 95 % interval, or "
        f"there is none), {counts[Verdict.NOT_RUN]} were not run in full. Each has its threshold "
        "in its sentence; a claim of several parts holds if all do. The verdicts follow from the "
        "results alone. Intervals marked 'rows only' come from one seed and do not cover what "
        "another seed would give.",
    ]


def not_run(study: Study, workspace: Workspace) -> list[str]:
    """Return what a reader might expect and will not find."""
    config = study.config
    lines = []
    if config.name != _PAPER_CONFIG or not study.inputs.is_papers_base:
        lines.append(
            f"The paper's own setting: the base here is {study.inputs.base}. --config paper "
            "takes GPT-2's weights from the Hub and was not run. So absolute perplexities are not "
            "to be compared with the paper's."
        )
    asked, reported = wanted(config), reportable(study, workspace)
    if len(reported) < len(asked):
        lines.append(
            "Everything but tuning: adapters are trained with what the searches find, and these "
            "are not done."
        )
    for experiment in reported:
        needs = needs_of(experiment, study)
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
        lines.append(f"{experiment.title}: {', '.join(lacking)} are missing.")
    if lines and lines[-1].endswith("are missing."):
        lines.append(
            "Where something is missing: cells of which nothing is known show -, cells of which a "
            "part is known say how much (2 of 5 seeds), figures show what is there, and claims "
            "are not judged."
        )
    lines += [
        f"{experiment.title}: not in config {config.name}."
        for experiment in (*EXPERIMENTS, TUNING)
        if experiment not in asked
    ]
    return [*lines, f"Not part of this study yet: {'; '.join(LATER)}."]


def _times(stages: Sequence[Mapping[str, object]]) -> Table:
    """Return wall time and memory of the stages, by experiment; speed of those that ended well."""
    rows: dict[tuple[str, str], list[float]] = {}
    commits: dict[tuple[str, str], dict[str, None]] = {}
    for each in stages:
        row = rows.setdefault((str(each["experiment"]), str(each["stage"])), [0.0, 0.0, 0.0, 0.0])
        of = (str(each["experiment"]), str(each["stage"]))
        if found := _COMMIT.search(str(each["machine"])):
            commits.setdefault(of, {})[found[1]] = None
        seconds = float(str(each["seconds"]))
        row[0] += seconds
        row[1] += float(str(each.get("tokens", 0)))
        row[2] = max(row[2], float(str(each["peak_rss_mib"])))
        row[3] += seconds if each["complete"] else 0.0
    cells: list[list[Cell]] = [
        [
            experiment,
            stage,
            duration(seconds),
            f"{tokens / 1e3:,.0f} k" if tokens else None,
            f"{tokens / ended:,.0f}" if tokens and ended else None,
            f"{peak:,.0f}",
            ", ".join(commits.get((experiment, stage), ())),
        ]
        for (experiment, stage), (seconds, tokens, peak, ended) in rows.items()
    ]
    cells.append(["all", "", duration(sum(row[0] for row in rows.values())), *[None] * 4])
    return Table(
        "Wall time",
        [
            "experiment",
            "stage",
            "time",
            "tokens",
            "tokens/s",
            "peak memory of the process, MiB",
            "commit",
        ],
        cells,
    )

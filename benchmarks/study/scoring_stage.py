"""Stage: the losses that are missing, model by model, each written down when it is known."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from benchmarks.study.evaluator import Evaluator, NotFinite
from benchmarks.study.inputs import Sources
from benchmarks.study.records import Record
from benchmarks.study.steps import steps
from benchmarks.study.study import Scoring, Study, Terms
from benchmarks.study.workspace import Workspace

# Digits of a row's nats that are kept: a mean over rows is then good to seven.
_DIGITS = 5


def rounded(value: float, digits: int = _DIGITS) -> float:
    """Return `value` to so many digits."""
    return float(f"{value:.{digits}g}")


def missing_scorings(
    study: Study, scorings: Iterable[Scoring], workspace: Workspace
) -> dict[str, Scoring]:
    """Return {key: scoring} of what is not done; equal keys come once."""
    keyed = {study.scoring_key(scoring): scoring for scoring in scorings}
    return {key: scoring for key, scoring in keyed.items() if key not in workspace.losses}


def score_missing(
    study: Study,
    missing: Mapping[str, Scoring],
    evaluator: Evaluator,
    sources: Sources,
    workspace: Workspace,
    experiment: str,
) -> None:
    """Score what is missing; one fold a model.

    Raises:
        OSError: A result could not be written.
    """
    by_terms: dict[Terms, dict[str, Scoring]] = {}
    for key, scoring in missing.items():
        by_terms.setdefault(scoring.terms, {})[key] = scoring
    tokens = {
        key: sum(tokens_of(study, scoring, sources, workspace)) for key, scoring in missing.items()
    }
    amount = sum(tokens.values())
    with (
        steps(f"score for {experiment}", amount) as advance,
        workspace.stage("score", experiment, models=len(by_terms), tokens=amount),
    ):
        for terms, scorings in by_terms.items():
            mix = [(workspace.adapter(study.adapter_key(spec)), weight) for spec, weight in terms]
            for key, scoring in scorings.items():
                rows = sources.texts(scoring.domain, scoring.part, scoring.template)
                record: Record = {
                    "key": key,
                    "rows": study.rows_key(scoring.domain, scoring.part, scoring.template),
                    "mix": [[folder.name, weight] for folder, weight in mix],
                }
                try:
                    nats = evaluator.row_nats(mix, rows, study.config.training.loss_scope)
                except NotFinite as error:
                    record["not_finite"] = str(error)
                else:
                    # Weights are chosen on validation rows, which needs their sum alone.
                    whole = scoring.part == "test"
                    record["nats"] = (
                        [rounded(value) for value in nats] if whole else [rounded(sum(nats), 9)]
                    )
                workspace.losses.add(record)
                advance(tokens[key], f"{len(terms)} adapters on {scoring.domain}")


def tokens_of(study: Study, scoring: Scoring, sources: Sources, workspace: Workspace) -> list[int]:
    """Return the scored tokens of a scoring's rows, and keep them."""
    key = study.rows_key(scoring.domain, scoring.part, scoring.template)
    record = workspace.rows.get(key)
    if record is None:
        rows = sources.texts(scoring.domain, scoring.part, scoring.template)
        scope = study.config.training.loss_scope
        record = {
            "key": key,
            "domain": scoring.domain,
            "part": scoring.part,
            "template": scoring.template,
            "tokens": [len(row.ids) - row.first_scored(scope) for row in rows],
        }
        workspace.rows.add(record)
    found: list[int] = record["tokens"]
    return found

"""Stage: the losses that are missing, model by model, each written down when it is known."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from benchmarks.study.evaluator import Evaluator, NotFinite
from benchmarks.study.inputs import Sources
from benchmarks.study.records import Record
from benchmarks.study.steps import steps
from benchmarks.study.study import Scoring, Study, Terms
from benchmarks.study.workspace import Workspace
from superpose_adapters.digest import canonical_digest

# Digits of a row's nats that are kept: a mean over rows is then good to seven.
_DIGITS = 5

# What a rows record holds, one entry a row, and the digest of the rows as they were encoded.
_OF_ROWS = ("tokens", "groups", "digest")

# How far losses through a server may be from those in this process, see `check_agreement`.
_AGREEMENT = {"float32": 1e-4, "bfloat16": 1e-2}


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
    """Score what is missing, on rows that `note_rows` knows; one fold a model.

    Raises:
        OSError: A result could not be written.
    """
    by_terms: dict[Terms, dict[str, Scoring]] = {}
    for key, scoring in missing.items():
        by_terms.setdefault(scoring.terms, {})[key] = scoring
    tokens = {
        key: sum(_rows_record(study, scoring, workspace)["tokens"])
        for key, scoring in missing.items()
    }
    amount = sum(tokens.values())
    with (
        steps(f"score for {experiment}", amount) as advance,
        workspace.stage("score", experiment, missing, models=len(by_terms), tokens=amount),
    ):
        for terms, scorings in by_terms.items():
            mix = [(workspace.adapter(study.adapter_key(spec)), weight) for spec, weight in terms]
            for key, scoring in scorings.items():
                rows = sources.texts(scoring.domain, scoring.part, scoring.template)
                record: Record = {
                    "key": key,
                    "rows": _rows_key(study, scoring),
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


def _rows_record(study: Study, scoring: Scoring, workspace: Workspace) -> Record:
    record = workspace.rows.get(_rows_key(study, scoring))
    assert record is not None, "note_rows comes first"
    return record


def _rows_key(study: Study, scoring: Scoring) -> str:
    return study.rows_key(scoring.domain, scoring.part, scoring.template)


def note_rows(
    study: Study,
    scorings: Iterable[Scoring],
    sources: Sources,
    workspace: Workspace,
    *,
    check: bool,
) -> None:
    """Keep what is known of the rows that losses are of: for each its scored tokens and its group.

    A record of an earlier version, without groups or digest, is made anew.

    Args:
        study: Gives the keys.
        scorings: Whose rows must be known.
        sources: The rows.
        workspace: Keeps the records.
        check: More losses are to come, so that rows which are known must still be the same.

    Raises:
        ValueError: They are encoded otherwise than those that earlier losses are of.
    """
    for key, scoring in {_rows_key(study, scoring): scoring for scoring in scorings}.items():
        known = workspace.rows.get(key)
        whole = known is not None and all(name in known for name in _OF_ROWS)
        if whole and not check:
            continue
        record = _described(study, key, scoring, sources)
        if known is not None and any(known.get(n, record[n]) != record[n] for n in _OF_ROWS):
            raise ValueError(
                f"{workspace.out}: the {scoring.part} rows of {scoring.domain} are encoded "
                "otherwise than when losses were scored on them: restore the versions that "
                "adapters.jsonl names, or name another --out"
            )
        if not whole:
            workspace.rows.add(record)


def _described(study: Study, key: str, scoring: Scoring, sources: Sources) -> Record:
    rows = sources.texts(scoring.domain, scoring.part, scoring.template)
    scope = study.config.training.loss_scope
    return {
        "key": key,
        "domain": scoring.domain,
        "part": scoring.part,
        "template": scoring.template,
        "tokens": [len(row.ids) - row.first_scored(scope) for row in rows],
        "groups": sources.groups(scoring.domain, scoring.part),
        "digest": canonical_digest([[list(row.ids), row.first_scored(scope)] for row in rows]),
    }


def check_agreement(
    study: Study,
    missing: Mapping[str, Scoring],
    served: Evaluator,
    local: Evaluator,
    sources: Sources,
    workspace: Workspace,
) -> None:
    """Score the largest missing sum both in a server and here, and compare row by row.

    In float32 every row's nats agree to 1e-4 of them. In bfloat16, where batches of another shape
    round otherwise, the nats of all rows together agree to 1e-2 of them: measured on 16 rows of
    SmolLM2 they were 2e-3 apart, single rows 1e-2.

    Raises:
        ValueError: They do not agree.
    """
    scoring = max(missing.values(), key=lambda each: len(each.terms))
    mix = [(workspace.adapter(study.adapter_key(spec)), weight) for spec, weight in scoring.terms]
    rows = sources.texts(scoring.domain, scoring.part, scoring.template)
    found: list[list[float] | None] = []
    for evaluator in (served, local):
        try:
            found.append(evaluator.row_nats(mix, rows, study.config.training.loss_scope))
        except NotFinite:
            found.append(None)
    there, here = found
    if there is None or here is None:
        agree = there is here
        detail = "only one of them is finite"
    else:
        if study.config.evaluation.dtype != "float32":
            there, here = [sum(there)], [sum(here)]
        tolerance = _AGREEMENT[study.config.evaluation.dtype]
        apart = [abs(t - h) / max(abs(h), 1.0) for t, h in zip(there, here, strict=True)]
        # Row by row: max() may pass over a NaN, a comparison with it is false.
        agree = all(each <= tolerance for each in apart)
        detail = f"they differ by {max(apart):.1e} of the nats, more than {tolerance:g}"
    if not agree:
        raise ValueError(
            f"losses of {len(mix)} adapters on {scoring.domain} are not the same through the "
            f"server and in this process: {detail}; score without --via-server and report the "
            "server's fault"
        )

"""What is done, what is to do, and about how long that takes."""

from __future__ import annotations

import sys

from benchmarks.report import Table
from benchmarks.study.config import Config
from benchmarks.study.experiments.tuning import missing_searches, tuned_study
from benchmarks.study.inputs import Inputs, Sources
from benchmarks.study.plan import TUNING, wanted
from benchmarks.study.run import Amounts, amounts, to_do
from benchmarks.study.steps import duration
from benchmarks.study.study import Study
from benchmarks.study.workspace import Workspace

# Tokens a second, times parameters of the base, where nothing was measured yet: two cores of 2024.
_TRAINING_SPEED = 4e10
_SCORING_SPEED = 5e10


def show_status(config: Config, inputs: Inputs, sources: Sources, workspace: Workspace) -> None:
    """Print a table of what is to do, and the time left."""
    study = Study(config, inputs)
    planned: set[str] = set()
    rows: list[list[str | float | int | None]] = []
    training = scoring = 0.0
    untuned = missing_searches(study, workspace)
    for experiment in wanted(config):
        if experiment is not TUNING and untuned:
            # How its adapters are trained is not known yet.
            rows.append([experiment.name, "after tuning", None, None, None, None, None])
            continue
        chosen = study if experiment is TUNING else tuned_study(study, workspace)
        needs = experiment.needs(chosen)
        todo = to_do(chosen, needs, workspace)
        left: Amounts = amounts(chosen, todo, sources, workspace, planned)
        training += left.training_tokens
        scoring += left.scored_tokens
        rows.append(
            [
                experiment.name,
                f"{len(needs.scorings) - left.scorings} of {len(needs.scorings)}",
                left.adapters,
                f"{left.training_tokens / 1e3:,.0f} k",
                f"{left.scored_tokens / 1e3:,.0f} k",
                left.pairs,
                left.findings,
            ]
        )
    columns = [
        "experiment",
        "losses done",
        "adapters to train",
        "tokens to train on",
        "tokens to score",
        "pairs to measure",
        "findings to make",
    ]
    print(Table(f"study {config.name}", columns, rows).markdown(), file=sys.stderr)
    train_speed = speed(workspace, "train") or _TRAINING_SPEED / inputs.parameters
    score_speed = speed(workspace, "score") or _SCORING_SPEED / inputs.parameters
    print(
        f"left: about {duration(training / train_speed)} of training at {train_speed:,.0f} "
        f"tokens/s and {duration(scoring / score_speed)} of scoring at {score_speed:,.0f} "
        "tokens/s, besides tuning",
        file=sys.stderr,
    )


def speed(workspace: Workspace, stage: str) -> float | None:
    """Return the tokens a second that earlier stages of a kind made, or None."""
    done = [e for e in workspace.stages() if e["stage"] == stage and e["complete"]]
    seconds = sum(float(str(each["seconds"])) for each in done)
    tokens = sum(float(str(each["tokens"])) for each in done)
    return tokens / seconds if seconds and tokens else None

"""All experiments, in the order in which they are run and reported."""

from __future__ import annotations

from collections.abc import Iterable

from benchmarks.study.config import Config
from benchmarks.study.experiment import Experiment
from benchmarks.study.experiments import (
    blocks,
    compositions,
    controls,
    lambdas,
    orthogonal,
    overlap,
    prediction,
    seeds,
    templates,
    tuning,
    unlearning,
)
from benchmarks.study.study import Needs, Study
from benchmarks.study.workspace import Workspace

TUNING = Experiment(
    "tuning",
    "Tuning",
    lambda config: config.tuning is not None,
    tuning.needs,
    tuning.section,
    tuning.measure,
)

EXPERIMENTS = (
    Experiment(
        "compositions",
        "The paper's tables",
        lambda config: True,
        compositions.needs,
        compositions.section,
    ),
    Experiment(
        "seeds", "Cosines: seeds and domains", lambda config: True, seeds.needs, seeds.section
    ),
    Experiment(
        "controls",
        "Matched joint models",
        lambda config: config.controls is not None,
        controls.needs,
        controls.section,
    ),
    Experiment(
        "lambdas",
        "Lambda, the weight of each delta",
        lambda config: config.lambdas is not None,
        lambdas.needs,
        lambdas.section,
    ),
    Experiment(
        "templates",
        "A template of its own for each domain",
        lambda config: config.templates is not None,
        templates.needs,
        templates.section,
    ),
    Experiment(
        "orthogonal",
        "Orthogonal by construction",
        lambda config: config.orthogonal is not None,
        orthogonal.needs,
        orthogonal.section,
    ),
    Experiment(
        "overlap",
        "Graded overlap",
        lambda config: config.overlap is not None,
        overlap.needs,
        overlap.section,
    ),
    Experiment(
        "blocks",
        "One block after the other",
        lambda config: config.blocks is not None,
        blocks.needs,
        blocks.section,
    ),
    Experiment(
        "prediction",
        "Interference foretold from geometry",
        lambda config: config.prediction is not None,
        prediction.needs,
        prediction.section,
    ),
    Experiment(
        "unlearning",
        "Exact unlearning",
        lambda config: config.unlearning is not None,
        unlearning.needs,
        unlearning.section,
        unlearning.measure,
    ),
)


def wanted(config: Config) -> list[Experiment]:
    """Return the experiments that a config asks for.

    Tuning comes first where the others are trained with what it finds, else last.
    """
    applied = config.tuning is not None and config.tuning.apply
    order = (TUNING, *EXPERIMENTS) if applied else (*EXPERIMENTS, TUNING)
    return [each for each in order if each.wanted(config)]


def reportable(study: Study, workspace: Workspace) -> list[Experiment]:
    """Return the experiments of which a report can tell: all that the config asks for.

    But where adapters are trained with what searches find, nobody knows before these are done what
    the other experiments need; what lies there is of another config.
    """
    if tuning.missing_searches(Study(study.config, study.inputs), workspace):
        return [TUNING]
    return wanted(study.config)


def needs_of(experiment: Experiment, study: Study) -> Needs:
    """Return what an experiment needs; what tuning needs is asked of the study before it."""
    asked = Study(study.config, study.inputs) if experiment is TUNING else study
    return experiment.needs(asked)


def needed_keys(study: Study, experiments: Iterable[Experiment]) -> set[str]:
    """Return the keys of all that experiments need: adapters, rows, losses, cosines, findings.

    A folder of results may hold more, of an earlier config or base.
    """
    keys: set[str] = set()
    for experiment in experiments:
        needs = needs_of(experiment, study)
        keys |= {study.adapter_key(spec) for spec in needs.adapters()}
        keys |= {study.rows_key(s.domain, s.part, s.template) for s in needs.scorings}
        keys |= {study.scoring_key(scoring) for scoring in needs.scorings}
        keys |= {study.pair_key(pair) for pair in needs.pairs}
        keys |= {study.pair_key(pair, activations=True) for pair in needs.activations}
        keys |= set(needs.findings)
    return keys

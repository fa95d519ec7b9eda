"""From a config to results: for each experiment, train, score and measure what is missing."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import cached_property

from benchmarks.study.evaluator import Evaluator, Local, Served
from benchmarks.study.experiment import Experiment
from benchmarks.study.geometry_stage import measure_missing, missing_pairs
from benchmarks.study.inputs import Sources
from benchmarks.study.scoring_stage import (
    check_agreement,
    missing_scorings,
    note_rows,
    score_missing,
)
from benchmarks.study.study import AdapterSpec, Needs, Pair, Scoring, Study
from benchmarks.study.training import train_missing, training_tokens
from benchmarks.study.workspace import Workspace

# Rows of a domain from which the mean number of tokens is taken.
_COUNTED_ROWS = 64


@dataclass(frozen=True)
class ToDo:
    """What an experiment still lacks.

    Attributes:
        adapters: To train first; what is not missing needs no adapter.
    """

    scorings: dict[str, Scoring] = field(default_factory=dict)
    pairs: dict[str, Pair] = field(default_factory=dict)
    activations: dict[str, Pair] = field(default_factory=dict)
    findings: dict[str, tuple[AdapterSpec, ...]] = field(default_factory=dict)

    def __bool__(self) -> bool:
        """True if there is anything to do."""
        return bool(self.scorings or self.pairs or self.activations or self.findings)

    @property
    def needed(self) -> list[AdapterSpec]:
        """The adapters that it takes."""
        return Needs(
            dict.fromkeys(self.scorings.values()),
            dict.fromkeys(self.pairs.values()),
            dict.fromkeys(self.activations.values()),
            self.findings,
        ).adapters()


def to_do(study: Study, needs: Needs, workspace: Workspace) -> ToDo:
    """Compare what is needed with what is done."""
    return ToDo(
        missing_scorings(study, needs.scorings, workspace),
        missing_pairs(study, needs.pairs, workspace, activations=False),
        missing_pairs(study, needs.activations, workspace, activations=True),
        {key: specs for key, specs in needs.findings.items() if key not in workspace.findings},
    )


class Runner:
    """Does what is missing."""

    def __init__(
        self,
        study: Study,
        sources: Sources,
        workspace: Workspace,
        *,
        say: Callable[[str], None],
    ) -> None:
        """Take the study; `say` is told in a line what happens."""
        self.study = study
        self._sources = sources
        self._workspace = workspace
        self._say = say
        self._served: Served | None = None

    @cached_property
    def _local(self) -> Local:
        return Local(self._sources.base, self.study.config.evaluation)

    def _scorer(self) -> Evaluator:
        if not self.study.config.evaluation.served:
            return self._local
        if self._served is None:
            self._served = Served(self._sources.base, self.study.config.evaluation)
        return self._served

    def run(self, experiment: Experiment) -> int:
        """Bring one experiment to its end.

        Returns:
            How many results were dropped, of this experiment and of others: those of adapters that
            were trained again and became others. What this one needs of them is made again.

        Raises:
            ValueError: Bad input, a training whose loss is not finite, rows that are encoded
                otherwise than before, or a server whose losses are not those of this process.
            OSError: A result could not be written.
        """
        study, sources, workspace = self.study, self._sources, self._workspace
        name, needs = experiment.name, experiment.needs(study)
        todo = to_do(study, needs, workspace)
        note_rows(study, needs.scorings, sources, workspace, check=bool(todo))
        if not todo:
            self._say(f"{name}: nothing to do")
            return 0
        dropped = 0
        while more := self._train(todo, name):
            self._say(
                f"{name}: adapters were trained again and are not those of before; {more} results "
                "of them are made again"
            )
            dropped += more
            todo = to_do(study, needs, workspace)
        if todo.scorings:
            scorer = self._scorer()
            if study.config.evaluation.served:
                check_agreement(study, todo.scorings, scorer, self._local, sources, workspace)
            score_missing(study, todo.scorings, scorer, sources, workspace, name)
        if todo.pairs or todo.activations:
            measure_missing(
                study, todo.pairs, todo.activations, self._local, sources, workspace, name
            )
        for key in todo.findings:
            assert experiment.measure is not None
            with workspace.stage("measure", name, [key]):
                experiment.measure(study, key, sources, workspace)
        self._say(f"{name}: done")
        return dropped

    def _train(self, todo: ToDo, name: str) -> int:
        """Train what is needed, and return how many results were dropped."""
        needed = todo.needed
        tokens = self.tokens_a_row(needed)
        return train_missing(self.study, needed, self._sources, self._workspace, tokens, name)

    def tokens_a_row(self, specs: Iterable[AdapterSpec]) -> dict[str, float]:
        """Return {domain: mean tokens of a row} for the domains of some adapters."""
        return tokens_a_row(self.study, specs, self._sources)

    def close(self) -> None:
        """Stop the server, if there is one."""
        if self._served is not None:
            self._served.close()


def tokens_a_row(study: Study, specs: Iterable[AdapterSpec], sources: Sources) -> dict[str, float]:
    """Return {domain: mean tokens of a row}, counted on a few."""
    found = {}
    for domain in sorted({domain for spec in specs for domain in spec.domains}):
        rows = sources.texts(domain, "validation", study.template)[:_COUNTED_ROWS]
        found[domain] = sum(len(row.ids) for row in rows) / len(rows)
    return found


@dataclass(frozen=True)
class Amounts:
    """How much an experiment still takes."""

    adapters: int
    training_tokens: float
    scorings: int
    scored_tokens: float
    pairs: int
    findings: int


def amounts(
    study: Study, todo: ToDo, sources: Sources, workspace: Workspace, planned: set[str]
) -> Amounts:
    """Count what is to do; adapters in `planned` are counted by another experiment."""
    missing = []
    for spec in todo.needed:
        key = study.adapter_key(spec)
        if key not in planned and not workspace.adapter(key).is_dir():
            missing.append(spec)
            planned.add(key)
    tokens = tokens_a_row(study, missing, sources)
    scored = 0
    for key, scoring in todo.scorings.items():
        if key not in planned:
            planned.add(key)
            rows = sources.texts(scoring.domain, scoring.part, scoring.template)
            scored += sum(len(row.ids) for row in rows)
    return Amounts(
        adapters=len(missing),
        training_tokens=sum(training_tokens(spec, tokens) for spec in missing),
        scorings=len(todo.scorings),
        scored_tokens=scored,
        pairs=len(todo.pairs) + len(todo.activations),
        findings=len(todo.findings),
    )

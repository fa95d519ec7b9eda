"""What an experiment is."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from benchmarks.study.config import Config
from benchmarks.study.document import Section
from benchmarks.study.inputs import Sources
from benchmarks.study.results import Results
from benchmarks.study.study import Needs, Study
from benchmarks.study.workspace import Workspace

Measure = Callable[[Study, str, Sources, Workspace], None]


@dataclass(frozen=True)
class Experiment:
    """One question.

    Attributes:
        name: One word.
        title: Of its section.
        wanted: Whether a config asks for it.
        needs: What must be known; the stages see to it.
        section: What follows; must bear with anything that is missing.
        measure: Measures one finding, by its key, and keeps it in the workspace.
    """

    name: str
    title: str
    wanted: Callable[[Config], bool]
    needs: Callable[[Study], Needs]
    section: Callable[[Study, Results], Section]
    measure: Measure | None = None

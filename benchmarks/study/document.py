"""What a report is made of: sections with tables, figures and claims."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from benchmarks.report import Table
from benchmarks.study.verdict import Verdict

Draw = Callable[[Any], None]
"""Draws into a matplotlib figure."""


@dataclass(frozen=True)
class Picture:
    """A figure.

    Attributes:
        name: Of its file.
        caption: What it shows, and how to read it.
        size: Width and height in inches.
    """

    name: str
    caption: str
    draw: Draw
    size: tuple[float, float] = (8.0, 4.6)


@dataclass(frozen=True)
class Plain:
    """A claim in plain words, for the summary.

    Attributes:
        question: Goes on from "whether".
        yes: The sentence if it holds.
        no: The sentence if it does not.
    """

    question: str
    yes: str
    no: str


@dataclass(frozen=True)
class Claim:
    """A sentence that the results bear out, contradict or leave open.

    Attributes:
        text: The sentence, with its threshold.
        verdict: What became of it.
        evidence: The figures that decide.
        plain: What it means, if it belongs in the summary.
    """

    text: str
    verdict: Verdict
    evidence: str = ""
    plain: Plain | None = None


@dataclass
class Section:
    """One experiment.

    Attributes:
        text: Paragraphs.
        notes: Shown below the tables.
    """

    name: str
    title: str
    text: list[str] = field(default_factory=list)
    tables: list[Table] = field(default_factory=list)
    pictures: list[Picture] = field(default_factory=list)
    claims: list[Claim] = field(default_factory=list)
    notes: Sequence[str] = ()
    data: dict[str, Any] = field(default_factory=dict)

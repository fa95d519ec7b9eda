"""Whether results bear out a claim: judged from whole intervals, and only if nothing is missing."""

from __future__ import annotations

from collections.abc import Iterable
from enum import StrEnum

from benchmarks.study.statistics import Interval


class Verdict(StrEnum):
    """What became of a claim."""

    HOLDS = "holds"
    FAILS = "does not hold"
    OPEN = "not decided"
    NOT_RUN = "not run"


def at_least(interval: Interval | None, threshold: float) -> Verdict:
    """Judge that a value is at least `threshold`: open if the threshold lies in its interval."""
    if interval is None or not interval.complete:
        return Verdict.NOT_RUN
    if interval.low >= threshold:
        return Verdict.HOLDS
    return Verdict.FAILS if interval.high < threshold else Verdict.OPEN


def at_most(interval: Interval | None, threshold: float) -> Verdict:
    """Judge that a value is at most `threshold`: open if the threshold lies in its interval."""
    if interval is None or not interval.complete:
        return Verdict.NOT_RUN
    if interval.high <= threshold:
        return Verdict.HOLDS
    return Verdict.FAILS if interval.low > threshold else Verdict.OPEN


def exactly(known: bool | None) -> Verdict:
    """Judge what is counted and has no interval; None: it was not run."""
    if known is None:
        return Verdict.NOT_RUN
    return Verdict.HOLDS if known else Verdict.FAILS


def every(verdicts: Iterable[Verdict]) -> Verdict:
    """Judge that all hold: one that fails decides, but only if all were run."""
    found = set(verdicts)
    for verdict in (Verdict.NOT_RUN, Verdict.FAILS, Verdict.OPEN):
        if verdict in found:
            return verdict
    return Verdict.HOLDS if found else Verdict.NOT_RUN

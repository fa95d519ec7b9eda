"""Figures as cells of tables; where some of what a cell needs is missing, it says so."""

from __future__ import annotations

import math
from collections.abc import Iterable

import numpy as np

from benchmarks.report import show
from benchmarks.study.statistics import Interval, Losses

# A larger change, in per cent, is no number to compute with; a larger perplexity no one to read.
HUGE_PERCENT = 1e5


def change_cell(interval: Interval | None) -> str | None:
    """Return a change in per cent with its interval, and what the interval leaves out."""
    if interval is None:
        return None
    if interval.value > HUGE_PERCENT:
        return f"above +{HUGE_PERCENT:,.0f} %{_note(interval)}"
    ends = f" [{interval.low:+.1f}, {interval.high:+.1f}]" if interval.bounded else ""
    return f"{interval.value:+.1f} %{ends}{_note(interval)}"


def interval_cell(interval: Interval | None, digits: int = 4) -> str | None:
    """Return a value with its interval, and what the interval leaves out."""
    if interval is None:
        return None
    ends = f" [{interval.low:.{digits}f}, {interval.high:.{digits}f}]" if interval.bounded else ""
    return f"{interval.value:.{digits}f}{ends}{_note(interval)}"


def _note(interval: Interval) -> str:
    notes = []
    if interval.covers == "rows":
        notes.append("rows only, one seed" if interval.complete else "rows only")
    elif interval.covers == "scatter about a line":
        notes.append("one seed, scatter about the line only")
    elif not interval.bounded:
        notes.append(f"no interval, n = {interval.n}")
    if not interval.complete:
        notes.append(f"{interval.n} of {interval.asked} seeds")
    return f" ({'; '.join(notes)})" if notes else ""


def perplexity_cell(losses: Iterable[Losses | None]) -> float | str | None:
    """Return the geometric mean of the perplexities of models that differ in their seed."""
    asked = list(losses)
    known = [each for each in asked if each is not None]
    if not known:
        return None
    finite = [each for each in known if each.finite]
    if len(finite) < len(known):
        return f"not finite ({len(known) - len(finite)} of {len(asked)} seeds)"
    value = math.exp(float(np.mean([each.mean for each in known])))
    shown = f"{value:.1e}" if value > HUGE_PERCENT else value
    return _counted(shown, len(known), len(asked), "seeds")


def mean_cell(values: Iterable[float | None]) -> float | str | None:
    """Return the mean of values, one a seed or pair."""
    asked = list(values)
    known = [value for value in asked if value is not None]
    if not known:
        return None
    return _counted(float(np.mean(known)), len(known), len(asked), "values")


def _counted(shown: float | str, known: int, asked: int, what: str) -> float | str:
    return shown if known == asked else f"{show(shown)} ({known} of {asked} {what})"


def arms_of(count: int) -> str:
    """Return how many arms, one a seed."""
    return f"{count} arm{'' if count == 1 else 's'}"


def covered(seeds: int) -> str:
    """Return what intervals of changes cover, for a reader of a section of so many seeds."""
    if seeds == 1:
        return (
            "One seed: intervals cover the choice of test rows only (rows only, one seed), not "
            "what another seed would give."
        )
    return (
        f"{seeds} seeds: intervals cover the choice of test rows (bootstrap over clusters of "
        f"near-duplicates) and of seeds (Student's t for {seeds})."
    )

"""Figures as cells of tables."""

from __future__ import annotations

import math
from collections.abc import Iterable

import numpy as np

from benchmarks.study.statistics import WORST_LOSS, Interval, Losses

_HUGE = 1e5


def change_cell(interval: Interval | None) -> str | None:
    """Return a change of perplexity with its interval."""
    if interval is None:
        return None
    if interval.value > _HUGE:
        return f"above +{_HUGE:,.0f} %"
    return str(interval)


def perplexity_cell(losses: Iterable[Losses | None]) -> float | str | None:
    """Return the geometric mean of the perplexities that are known."""
    means = [each.mean for each in losses if each is not None]
    if not means:
        return None
    mean = float(np.mean(means))
    if mean >= WORST_LOSS:
        return "not finite"
    value = math.exp(mean)
    return f"{value:.1e}" if value > _HUGE else value


def mean_cell(values: Iterable[float | None]) -> float | None:
    """Return the mean of the values that are known."""
    known = [value for value in values if value is not None]
    return float(np.mean(known)) if known else None

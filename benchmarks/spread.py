"""Order statistics, because means hide what a noisy machine does."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass


def percentile(values: Sequence[float], percent: float) -> float:
    """Return the percentile (0 to 100), linear between neighbours; NaN if there are no values."""
    if not values:
        return math.nan
    ordered = sorted(values)
    at = (len(ordered) - 1) * percent / 100
    low = math.floor(at)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (at - low)


@dataclass(frozen=True)
class Spread:
    """A median, the quartiles around it, and of how many values."""

    median: float
    lower: float
    upper: float
    count: int

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """Summarise `values`; NaN if there are none."""
        lower, median, upper = (percentile(values, percent) for percent in (25, 50, 75))
        return cls(median, lower, upper, len(values))

    def scaled(self, factor: float) -> Spread:
        """Return the spread of the values times `factor`, which is above 0."""
        return Spread(self.median * factor, self.lower * factor, self.upper * factor, self.count)

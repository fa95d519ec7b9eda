"""Lines, ranks and the bootstrap: every interval of the study comes from here."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]

# Nats a token that stand for a loss that is not finite; e to it is the largest power of a double.
WORST_LOSS = 700.0

_LEVEL = 0.95


@dataclass(frozen=True)
class Losses:
    """Losses of one model on rows, in the order of the rows.

    Attributes:
        nats: Of each row.
        tokens: Scored tokens of each row.
        strata: Rows of each domain, one after the other; resampling keeps them.
    """

    nats: Array
    tokens: Array
    strata: tuple[int, ...]

    @property
    def mean(self) -> float:
        """Nats a token."""
        return float(self.nats.sum() / self.tokens.sum())

    @property
    def perplexity(self) -> float:
        """Exponential of the mean."""
        return float(np.exp(min(self.mean, WORST_LOSS)))


def join(parts: Sequence[Losses]) -> Losses:
    """Return the losses on the rows of all parts, one part after the other."""
    return Losses(
        np.concatenate([part.nats for part in parts]),
        np.concatenate([part.tokens for part in parts]),
        tuple(size for part in parts for size in part.strata),
    )


@dataclass(frozen=True)
class Interval:
    """A value with its bootstrap interval at 95 %."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        """Return it as a change in per cent."""
        return f"{self.value:+.1f} % [{self.low:+.1f}, {self.high:+.1f}]"


@lru_cache(64)
def _row_counts(strata: tuple[int, ...], resamples: int, seed: int) -> Array:
    """Return how often each row is drawn, (resamples, rows); every domain keeps its number."""
    generator = np.random.default_rng([seed, *strata])
    return np.concatenate(
        [generator.multinomial(size, np.full(size, 1 / size), size=resamples) for size in strata],
        axis=1,
    ).astype(np.float64)


def resampled_means(losses: Losses, resamples: int, seed: int = 0) -> Array:
    """Return the token-weighted mean loss of each resample of rows.

    Losses on the same rows are resampled alike, so that their differences are paired.
    """
    counts = _row_counts(losses.strata, resamples, seed)
    means: Array = (counts @ losses.nats) / (counts @ losses.tokens)
    return means


def percent_change(
    pairs: Sequence[tuple[Losses, Losses]], resamples: int, seed: int = 0
) -> Interval:
    """Return by how much perplexity changes from the first to the second model of each pair.

    Over several pairs (one a seed) it is the geometric mean of their ratios. Rows are resampled in
    pairs within each domain; with several pairs these are resampled too, so that the interval
    covers both the choice of rows and that of seeds.
    """
    points = [second.mean - first.mean for first, second in pairs]
    drawn = np.stack(
        [
            resampled_means(second, resamples, seed) - resampled_means(first, resamples, seed)
            for first, second in pairs
        ],
        axis=1,
    )  # (resamples, pairs)
    if len(pairs) > 1:
        generator = np.random.default_rng([seed, len(pairs)])
        weights = generator.multinomial(
            len(pairs), np.full(len(pairs), 1 / len(pairs)), size=resamples
        )
        means = (drawn * weights).sum(1) / len(pairs)
    else:
        means = drawn[:, 0]
    return _interval(float(np.mean(points)), means)


def _interval(point: float, drawn: Array) -> Interval:
    tail = (1 - _LEVEL) / 2
    low, high = np.quantile(drawn, [tail, 1 - tail])
    return Interval(
        *(100 * float(np.expm1(min(value, WORST_LOSS))) for value in (point, low, high))
    )


def mean_interval(values: Sequence[float], resamples: int, seed: int = 0) -> Interval:
    """Return the mean of values with its bootstrap interval."""
    array = np.asarray(values, dtype=np.float64)
    generator = np.random.default_rng([seed, len(array)])
    drawn = array[generator.integers(len(array), size=(resamples, len(array)))].mean(1)
    tail = (1 - _LEVEL) / 2
    low, high = np.quantile(drawn, [tail, 1 - tail])
    return Interval(float(array.mean()), float(low), float(high))


@dataclass(frozen=True)
class Line:
    """A least-squares line."""

    slope: float
    intercept: float
    r2: float

    def at(self, x: float) -> float:
        """Return its value."""
        return self.slope * x + self.intercept


def fit_line(x: Sequence[float], y: Sequence[float]) -> Line | None:
    """Return the least-squares line through points, or None if their x do not differ."""
    xs, ys = np.asarray(x, dtype=np.float64), np.asarray(y, dtype=np.float64)
    if len(xs) < 2 or np.ptp(xs) == 0:
        return None
    slope = float(((xs - xs.mean()) * (ys - ys.mean())).sum() / ((xs - xs.mean()) ** 2).sum())
    intercept = float(ys.mean() - slope * xs.mean())
    rest = ys - (slope * xs + intercept)
    spread = float(((ys - ys.mean()) ** 2).sum())
    return Line(slope, intercept, 1 - float((rest**2).sum()) / spread if spread else 1.0)


def ranks(values: Sequence[float]) -> Array:
    """Return ranks from 1; equal values share the mean of theirs."""
    array = np.asarray(values, dtype=np.float64)
    _, inverse, counts = np.unique(array, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    found: Array = (last - (counts - 1) / 2)[inverse].astype(np.float64)
    return found


def rank_correlation(x: Sequence[float], y: Sequence[float]) -> float:
    """Return Spearman's coefficient; NaN if either does not vary."""
    first, second = ranks(x), ranks(y)
    if np.ptp(first) == 0 or np.ptp(second) == 0:
        return float("nan")
    return float(np.corrcoef(first, second)[0, 1])


@dataclass(frozen=True)
class LeftOut:
    """How well a linear model foretells groups that it has not seen.

    Attributes:
        predicted: For each point, by the model of the other groups.
        error: Root mean square error.
        r2: 1 - squared error over that of the others' mean; below 0 it is worse than the mean.
    """

    predicted: Array
    error: float
    r2: float


def leave_one_out(features: Any, target: Sequence[float], groups: Sequence[object]) -> LeftOut:
    """Fit target on features (n, k) and an intercept without each group, and predict that group."""
    y = np.asarray(target, dtype=np.float64)
    x = np.column_stack(
        [np.ones(len(y)), np.asarray(features, dtype=np.float64).reshape(len(y), -1)]
    )
    predicted, plain = np.empty_like(y), np.empty_like(y)
    for group in dict.fromkeys(groups):
        out = np.asarray([each == group for each in groups])
        fitted, *_ = np.linalg.lstsq(x[~out], y[~out], rcond=None)
        predicted[out] = x[out] @ fitted
        plain[out] = y[~out].mean()
    error, baseline = ((y - predicted) ** 2).mean(), ((y - plain) ** 2).mean()
    return LeftOut(
        predicted, float(np.sqrt(error)), float(1 - error / baseline) if baseline else 0.0
    )

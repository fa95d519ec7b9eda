"""Lines, ranks, the bootstrap and the jackknife: every interval of the study comes from here."""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal, TypeVar

import numpy as np
import numpy.typing as npt
from scipy import stats

Array = npt.NDArray[np.float64]
U = TypeVar("U", bound=Hashable)

# Nats a token that stand for a loss that is not finite; e to it is the largest power of a double.
WORST_LOSS = 700.0

_LEVEL = 0.95
_TAIL = (1 - _LEVEL) / 2
# Of fewer points a rank correlation takes so few values that leaving some out may change nothing.
LEAST_RANKED = 6


@dataclass(frozen=True)
class Losses:
    """Losses of one model, cluster by cluster of near-duplicate rows.

    Near-duplicates are no independent draws, so a cluster is the unit that is resampled.

    Attributes:
        nats: Of each cluster, the sum over its rows.
        tokens: Scored tokens of each cluster.
        strata: (name, clusters) of each set of rows, one after the other; resampling keeps the
            number of each, and draws a set alike wherever it stands.
    """

    nats: Array
    tokens: Array
    strata: tuple[tuple[str, int], ...]

    @property
    def mean(self) -> float:
        """Nats a token."""
        return float(self.nats.sum() / self.tokens.sum())

    @property
    def perplexity(self) -> float:
        """Exponential of the mean."""
        return float(np.exp(min(self.mean, WORST_LOSS)))

    @property
    def finite(self) -> bool:
        """False if any loss stands for one that is not finite."""
        scored = self.tokens > 0
        return bool((self.nats[scored] < WORST_LOSS * self.tokens[scored]).all())


def clustered(name: str, nats: Array, tokens: Array, groups: Sequence[int]) -> Losses:
    """Return the losses of rows, summed over the rows of each group.

    Args:
        name: Of the set of rows.
        nats: Of each row.
        tokens: Of each row.
        groups: Equal for rows that are near-duplicates.
    """
    _, cluster = np.unique(np.asarray(groups), return_inverse=True)
    return Losses(
        np.bincount(cluster, weights=nats).astype(np.float64),
        np.bincount(cluster, weights=tokens).astype(np.float64),
        ((name, int(cluster.max()) + 1),),
    )


def join(parts: Sequence[Losses]) -> Losses:
    """Return the losses on the rows of all parts, one part after the other."""
    return Losses(
        np.concatenate([part.nats for part in parts]),
        np.concatenate([part.tokens for part in parts]),
        tuple(stratum for part in parts for stratum in part.strata),
    )


Covers = Literal["rows", "rows and seeds", "seeds", "domains", "scatter about a line"]


@dataclass(frozen=True)
class Interval:
    """A value with its interval at 95 %, which has no ends where there were too few units.

    Attributes:
        n: Units, mostly seeds, that it comes from.
        asked: Units that it should come from; more than `n` in a partial run.
        covers: The sources of chance that the interval accounts for.
    """

    value: float
    low: float
    high: float
    n: int
    asked: int
    covers: Covers

    @property
    def bounded(self) -> bool:
        """True if it has ends."""
        return math.isfinite(self.low) and math.isfinite(self.high)

    @property
    def complete(self) -> bool:
        """True if nothing that was asked for is missing."""
        return self.n >= self.asked

    def through(self, function: Callable[[float], float]) -> Interval:
        """Return the interval of an increasing function of the value; no end stays no end."""
        low, high = (function(e) if math.isfinite(e) else e for e in (self.low, self.high))
        return Interval(function(self.value), low, high, self.n, self.asked, self.covers)


def percent(log_ratio: float) -> float:
    """Return a change in per cent from the logarithm of a ratio."""
    return 100 * math.expm1(min(log_ratio, WORST_LOSS))


def student(freedom: int) -> float:
    """Return the 97.5 % quantile of Student's t.

    Raises:
        ValueError: No degree of freedom.
    """
    if freedom < 1:
        raise ValueError(f"Student's t needs a degree of freedom, got {freedom}")
    return float(stats.t.ppf(1 - _TAIL, freedom))


@lru_cache(32)
def _draws(name: str, clusters: int, resamples: int, seed: int) -> Array:
    """Return how often each cluster of a set is drawn, (resamples, clusters)."""
    generator = np.random.default_rng([seed, clusters, *name.encode()])
    drawn = generator.multinomial(clusters, np.full(clusters, 1 / clusters), size=resamples)
    return drawn.astype(np.float64)


def resampled_means(losses: Losses, resamples: int, seed: int = 0) -> Array:
    """Return the token-weighted mean loss of each resample of clusters within each stratum.

    Losses on the same rows are resampled alike, so that their differences are paired.
    """
    nats, tokens = np.zeros(resamples), np.zeros(resamples)
    start = 0
    for name, clusters in losses.strata:
        counts = _draws(name, clusters, resamples, seed)
        part = slice(start, start + clusters)
        nats += counts @ losses.nats[part]
        tokens += counts @ losses.tokens[part]
        start += clusters
    means: Array = nats / tokens
    return means


Contrast = Sequence[tuple[float, Losses]]
"""Models with their factors in a sum of mean losses, such as +1 and -1 for a difference."""


def percent_contrast(
    contrasts: Sequence[Contrast], resamples: int, asked: int | None = None, seed: int = 0
) -> Interval:
    """Return the mean of contrasts of mean losses, one a seed, as a ratio of perplexities.

    The interval is made on the logarithm. Rows: the percentile bootstrap over clusters, drawn
    alike for all seeds, because all are measured on the same rows. Seeds: s / sqrt(n) of the
    contrasts times Student's t for n - 1, because the bootstrap of a handful of seeds is far too
    narrow. Both are added in quadrature on each side. s holds some of the chance of rows again,
    which makes the interval a little wide rather than narrow. With one seed nothing is known of
    the seeds, and the interval covers the rows alone.

    Args:
        contrasts: One a seed that is known; the seeds share no adapter.
        resamples: Of the bootstrap.
        asked: How many seeds there should be.
        seed: Of the bootstrap.
    """
    count = len(contrasts)
    points = np.array([sum(factor * each.mean for factor, each in c) for c in contrasts])
    drawn = np.zeros(resamples)
    for factor, each in (term for contrast in contrasts for term in contrast):
        drawn += factor * resampled_means(each, resamples, seed) / count
    value = float(points.mean())
    low, high = np.quantile(drawn, [_TAIL, 1 - _TAIL])
    seeds = student(count - 1) * float(points.std(ddof=1)) / math.sqrt(count) if count > 1 else 0.0
    return Interval(
        value,
        value - math.hypot(max(0.0, value - low), seeds),
        value + math.hypot(max(0.0, high - value), seeds),
        count,
        count if asked is None else asked,
        "rows and seeds" if count > 1 else "rows",
    ).through(percent)


def percent_change(
    pairs: Sequence[tuple[Losses, Losses]], resamples: int, asked: int | None = None, seed: int = 0
) -> Interval:
    """Return by how much perplexity changes from the first to the second model of each pair.

    Over several pairs (one a seed) it is the geometric mean of their ratios; see
    `percent_contrast`.
    """
    contrasts = [((-1.0, first), (1.0, second)) for first, second in pairs]
    return percent_contrast(contrasts, resamples, asked, seed)


def jackknife(
    units: Iterable[U],
    statistic: Callable[[frozenset[U]], float | None],
    covers: Covers = "seeds",
    limits: tuple[float, float] = (-math.inf, math.inf),
) -> Interval | None:
    """Return a statistic of units with its interval, by leaving out one unit at a time.

    What is measured of two units, such as a cosine of adapters of two seeds, is left out with
    either, so that pairs that share an adapter are not taken for independent. For a mean of units
    it is the t interval. Source: Efron and Tibshirani, An Introduction to the Bootstrap, 11.5;
    Arvesen 1969 for statistics of pairs.

    Args:
        units: Independent of each other.
        statistic: Of those units that are kept; None where it is not defined.
        covers: What the units are.
        limits: Of the statistic; the interval ends there.

    Returns:
        None if the statistic of all units is not defined; without ends if any other is not.
    """
    every = frozenset(units)
    value = statistic(every)
    if value is None:
        return None
    count = len(every)
    left = [statistic(every - {unit}) for unit in every] if count > 1 else []
    known = np.array([each for each in left if each is not None])
    low, high = -math.inf, math.inf
    if count > 1 and len(known) == count:
        squares = float(((known - known.mean()) ** 2).sum())
        half = student(count - 1) * math.sqrt((count - 1) / count * squares)
        low, high = max(limits[0], value - half), min(limits[1], value + half)
    return Interval(value, low, high, count, count, covers)


def mean_if_known(values: Iterable[float | None]) -> float | None:
    """Return the mean, or None if any value is not known or there is none."""
    found = list(values)
    known = [value for value in found if value is not None]
    return float(np.mean(known)) if known and len(known) == len(found) else None


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


def slope_interval(x: Sequence[float], y: Sequence[float]) -> Interval | None:
    """Return the slope of the least-squares line with its interval, from the scatter about it.

    It says nothing of what other seeds would give. Without ends for two points; None where the x
    do not differ.
    """
    line = fit_line(x, y)
    if line is None:
        return None
    xs, ys = np.asarray(x, dtype=np.float64), np.asarray(y, dtype=np.float64)
    freedom = len(xs) - 2
    half = math.inf
    if freedom > 0:
        rest = ys - (line.slope * xs + line.intercept)
        variance = float((rest**2).sum()) / freedom
        half = student(freedom) * math.sqrt(variance / float(((xs - xs.mean()) ** 2).sum()))
    return Interval(line.slope, line.slope - half, line.slope + half, 1, 1, "scatter about a line")


def rank_correlation(x: Sequence[float], y: Sequence[float]) -> float:
    """Return Spearman's coefficient; NaN if either does not vary."""
    if np.ptp(x) == 0 or np.ptp(y) == 0:
        return float("nan")
    return float(stats.spearmanr(x, y).statistic)


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
    # What does no better than the mean differs from 0 by rounding.
    r2 = round(float(1 - error / baseline), 12) if baseline else 0.0
    return LeftOut(predicted, float(np.sqrt(error)), r2)

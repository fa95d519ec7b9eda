from __future__ import annotations

import math

import numpy as np
import pytest
from benchmarks.study.statistics import (
    WORST_LOSS,
    Losses,
    fit_line,
    join,
    leave_one_out,
    mean_interval,
    percent_change,
    rank_correlation,
    ranks,
    resampled_means,
)

_RESAMPLES = 4000


def _losses(nats: np.ndarray, tokens: float = 10.0) -> Losses:
    return Losses(nats, np.full(len(nats), tokens), (len(nats),))


def test_the_bootstrap_has_the_standard_error_of_a_mean() -> None:
    # Rows of equal length: the mean loss is a plain mean, whose standard error is known.
    nats = np.random.default_rng(1).normal(30, 6, 400)
    drawn = resampled_means(_losses(nats), _RESAMPLES)
    assert drawn.mean() == pytest.approx(nats.mean() / 10, rel=1e-3)
    assert drawn.std() == pytest.approx(nats.std() / 10 / math.sqrt(400), rel=0.05)


def test_strata_keep_their_size() -> None:
    # Within each domain all rows are alike, so nothing is left to vary.
    parts = [_losses(np.full(20, 5.0)), _losses(np.full(40, 50.0))]
    whole = join(parts)
    assert whole.strata == (20, 40)
    assert np.ptp(resampled_means(whole, 50)) == pytest.approx(0, abs=1e-12)
    assert whole.mean == pytest.approx((100 + 2000) / 600)


def test_a_change_is_paired() -> None:
    # The second model loses exactly 0.1 nats a token more on every row, however rows differ.
    nats = np.random.default_rng(2).normal(30, 10, 100)
    change = percent_change([(_losses(nats), _losses(nats + 1.0))], _RESAMPLES)
    assert change.value == pytest.approx(100 * math.expm1(0.1))
    assert change.low == pytest.approx(change.value)
    assert change.high == pytest.approx(change.value)


def test_a_change_over_seeds_covers_the_seeds() -> None:
    nats = np.full(50, 30.0)
    pairs = [(_losses(nats), _losses(nats + 10 * shift)) for shift in (0.0, 0.1, 0.2, 0.3)]
    change = percent_change(pairs, _RESAMPLES)
    assert change.value == pytest.approx(100 * math.expm1(0.15))
    spread = np.std([0.0, 0.1, 0.2, 0.3]) / 2  # of a mean of four
    assert change.high == pytest.approx(100 * math.expm1(0.15 + 1.96 * spread), rel=0.12)
    assert change.low < change.value < change.high


def test_the_same_seed_gives_the_same_interval() -> None:
    nats = np.random.default_rng(3).normal(30, 6, 60)
    pairs = [(_losses(nats), _losses(nats[::-1]))]
    assert percent_change(pairs, 500) == percent_change(pairs, 500)


def test_losses_that_are_not_finite_stay_so() -> None:
    worst = _losses(np.full(4, 10 * WORST_LOSS))
    change = percent_change([(_losses(np.full(4, 3.0)), worst)], 100)
    assert change.value > 1e100


def test_mean_interval() -> None:
    values = list(np.random.default_rng(4).normal(0.2, 0.05, 200))
    interval = mean_interval(values, _RESAMPLES)
    assert interval.high - interval.low == pytest.approx(
        2 * 1.96 * np.std(values) / math.sqrt(200), rel=0.06
    )


def test_lines() -> None:
    line = fit_line([0, 1, 2], [1, 3, 5])
    assert line is not None
    assert (line.slope, line.intercept, line.r2) == pytest.approx((2, 1, 1))
    assert line.at(10) == pytest.approx(21)
    assert fit_line([1, 1], [0, 2]) is None
    assert fit_line([1], [0]) is None


def test_ranks() -> None:
    assert list(ranks([10, 30, 20, 20])) == [1, 4, 2.5, 2.5]
    assert rank_correlation([1, 2, 3], [10, 100, 1000]) == pytest.approx(1)
    assert rank_correlation([1, 2, 3], [3, 2, 1]) == pytest.approx(-1)
    assert math.isnan(rank_correlation([1, 1, 1], [1, 2, 3]))


def test_leaving_groups_out() -> None:
    x = np.arange(12.0)
    left = leave_one_out(x, list(3 * x + 1), list(range(12)))
    assert left.error == pytest.approx(0, abs=1e-9)
    assert left.r2 == pytest.approx(1)
    noise = np.random.default_rng(5).normal(size=(40, 3))
    guess = leave_one_out(noise, list(np.random.default_rng(6).normal(size=40)), list(range(40)))
    assert guess.r2 < 0.1
    # Twins in other groups would tell the answer; in their own they do not.
    twins = list(range(20)) * 2
    keys = np.eye(20)[twins]
    values = list(np.random.default_rng(7).normal(size=20)) * 2
    assert leave_one_out(keys, values, list(range(40))).r2 > 0.99
    assert leave_one_out(keys, values, twins).r2 < 0.1

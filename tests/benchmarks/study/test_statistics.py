from __future__ import annotations

import math

import numpy as np
import pytest
from benchmarks.study.statistics import (
    WORST_LOSS,
    Interval,
    Losses,
    clustered,
    fit_line,
    jackknife,
    join,
    leave_one_out,
    mean_if_known,
    percent_change,
    percent_contrast,
    rank_correlation,
    resampled_means,
    slope_interval,
    student,
)

_RESAMPLES = 4000

Values = dict[tuple[tuple[int, int], tuple[int, int]], float]


def _losses(nats: np.ndarray, tokens: float = 10.0, name: str = "rows") -> Losses:
    return Losses(nats, np.full(len(nats), tokens), ((name, len(nats)),))


def test_the_bootstrap_has_the_standard_error_of_a_mean() -> None:
    # Rows of equal length: the mean loss is a plain mean, whose standard error is known.
    nats = np.random.default_rng(1).normal(30, 6, 400)
    drawn = resampled_means(_losses(nats), _RESAMPLES)
    assert drawn.mean() == pytest.approx(nats.mean() / 10, rel=1e-3)
    assert drawn.std() == pytest.approx(nats.std() / 10 / math.sqrt(400), rel=0.05)


def test_near_duplicates_count_once() -> None:
    # Every row five times is no more evidence than every row once.
    nats = np.random.default_rng(1).normal(30, 6, 80)
    groups = np.random.default_rng(2).permutation(np.repeat(np.arange(80), 5))
    copies = clustered("rows", nats[groups], np.full(400, 10.0), [int(g) + 7 for g in groups])
    assert copies.strata == (("rows", 80),)
    assert copies.mean == pytest.approx(nats.mean() / 10)
    expected = nats.std() / 10 / math.sqrt(80)
    assert resampled_means(copies, _RESAMPLES).std() == pytest.approx(expected, rel=0.05)


def test_strata_keep_their_size() -> None:
    # Within each domain all rows are alike, so nothing is left to vary.
    parts = [_losses(np.full(20, 5.0), name="a"), _losses(np.full(40, 50.0), name="b")]
    whole = join(parts)
    assert whole.strata == (("a", 20), ("b", 40))
    assert np.ptp(resampled_means(whole, 50)) == pytest.approx(0, abs=1e-12)
    assert whole.mean == pytest.approx((100 + 2000) / 600)


def test_rows_are_drawn_alike_wherever_they_stand() -> None:
    generator = np.random.default_rng(3)
    a, b = (_losses(generator.normal(30, 6, 50), name=name) for name in "ab")
    flat = _losses(np.zeros(50), name="b")
    # Of equal tokens, the mean over a and b is the mean of theirs, resample by resample.
    alone = [resampled_means(each, 200) for each in (a, b)]
    assert resampled_means(join([b, a]), 200) == pytest.approx((alone[0] + alone[1]) / 2)
    assert resampled_means(join([a, flat]), 200) == pytest.approx(alone[0] / 2)
    # Other rows are drawn apart.
    assert abs(np.corrcoef(alone[0], alone[1])[0, 1]) < 0.25


def test_a_change_is_paired() -> None:
    # The second model loses exactly 0.1 nats a token more on every row, however rows differ.
    nats = np.random.default_rng(2).normal(30, 10, 100)
    change = percent_change([(_losses(nats), _losses(nats + 1.0))], _RESAMPLES)
    assert change.value == pytest.approx(100 * math.expm1(0.1))
    assert change.low == pytest.approx(change.value)
    assert change.high == pytest.approx(change.value)
    assert (change.n, change.asked, change.covers) == (1, 1, "rows")


@pytest.mark.parametrize("seeds", [2, 3, 5])
@pytest.mark.parametrize(("row_spread", "seed_spread"), [(1.0, 0.02), (0.05, 0.3), (1.0, 0.15)])
def test_the_interval_of_a_change_covers_the_truth(
    seeds: int, row_spread: float, seed_spread: float
) -> None:
    """Rows or seeds or both vary: the true change lies in 95 % of the intervals."""
    generator = np.random.default_rng([seeds, int(100 * row_spread), int(100 * seed_spread)])
    rows, repetitions, truth = 60, 400, 0.1
    first = _losses(np.full(rows, 30.0))
    covered = 0
    for _ in range(repetitions):
        of_rows = generator.normal(truth, row_spread, rows)
        pairs = [
            (first, _losses(30 + 10 * (of_rows + shift)))
            for shift in generator.normal(0, seed_spread, seeds)
        ]
        change = percent_change(pairs, 400)
        covered += change.low <= 100 * math.expm1(truth) <= change.high
    assert covered / repetitions >= 0.92
    assert covered < repetitions


def test_a_change_says_what_it_covers() -> None:
    nats = np.random.default_rng(2).normal(30, 10, 100)
    pairs = [(_losses(nats), _losses(nats + shift)) for shift in (0.9, 1.0, 1.1)]
    change = percent_change(pairs, 100, asked=5)
    assert (change.n, change.asked, change.complete) == (3, 5, False)
    assert change.covers == "rows and seeds"
    assert percent_change(pairs, 100).complete


def test_a_contrast_of_changes() -> None:
    # One sum is 0.3 nats above its joint model, another 0.1: a ratio of e^0.2.
    nats = np.random.default_rng(2).normal(30, 10, 100)
    here, there = _losses(nats, name="here"), _losses(nats[:40], name="there")
    above = [_losses(nats + 3, name="here"), _losses(nats[:40] + 1, name="there")]
    contrast = [(1.0, above[0]), (-1.0, here), (-1.0, above[1]), (1.0, there)]
    found = percent_contrast([contrast], 100)
    assert found.value == pytest.approx(100 * math.expm1(0.2))
    assert found.high - found.low == pytest.approx(0, abs=1e-6)


def test_the_same_seed_gives_the_same_interval() -> None:
    nats = np.random.default_rng(3).normal(30, 6, 60)
    pairs = [(_losses(nats), _losses(nats[::-1]))]
    assert percent_change(pairs, 500) == percent_change(pairs, 500)


def test_losses_that_are_not_finite_stay_so() -> None:
    worst = _losses(np.full(4, 10 * WORST_LOSS))
    change = percent_change([(_losses(np.full(4, 3.0)), worst)], 100)
    assert change.value > 1e100
    assert not worst.finite
    assert not join([_losses(np.full(4, 3.0)), worst]).finite
    assert Losses(np.array([0.0, 3.0]), np.array([0.0, 2.0]), (("r", 2),)).finite


@pytest.mark.parametrize("freedom", [1, 2, 4, 10, 11, 30])
def test_students_t(freedom: int) -> None:
    """Between the quantiles lies 95 % of the density."""
    t = np.linspace(0, student(freedom), 200_001)
    scale = math.gamma((freedom + 1) / 2) / math.gamma(freedom / 2) / math.sqrt(freedom * math.pi)
    density = scale * (1 + t**2 / freedom) ** (-(freedom + 1) / 2)
    assert 2 * np.trapezoid(density, t) == pytest.approx(0.95, abs=1e-5)


def test_students_t_needs_freedom() -> None:
    with pytest.raises(ValueError, match="degree of freedom"):
        student(0)


def test_the_jackknife_of_a_mean_is_the_t_interval() -> None:
    values = dict(enumerate([0.3, 0.5, 0.1, 0.2, 0.7]))
    found = jackknife(values, lambda kept: float(np.mean([values[k] for k in kept])))
    assert found is not None
    # 2.7764451: any table of Student's t, 4 degrees of freedom, 97.5 %.
    half = 2.7764451 * np.std(list(values.values()), ddof=1) / math.sqrt(5)
    assert found.value == pytest.approx(0.36)
    assert (found.low, found.high) == pytest.approx((0.36 - half, 0.36 + half))


def test_the_jackknife_covers_the_truth_of_pairs_that_share_adapters() -> None:
    """A grid of 3 domains and 5 seeds, pairs of different seeds: 95 % of the intervals hold."""
    generator = np.random.default_rng(11)
    pairs = [
        ((d, s), (e, t))
        for d in range(3)
        for e in range(d + 1, 3)
        for s in range(5)
        for t in range(5)
        if s != t
    ]
    assert len(pairs) == 60
    covered = independent = 0
    repetitions = 300
    for _ in range(repetitions):
        effect = generator.normal(0, 1, (3, 5))

        values = {(a, b): effect[a] + effect[b] + generator.normal(0, 0.3) for a, b in pairs}

        def mean(kept: frozenset[int], values: Values = values) -> float | None:
            there = [value for (a, b), value in values.items() if {a[1], b[1]} <= kept]
            return float(np.mean(there)) if there else None

        found = jackknife(range(5), mean)
        assert found is not None
        covered += found.low <= 0 <= found.high
        # What taking 60 pairs for independent would have said.
        spread = float(np.std(list(values.values())))
        independent += abs(np.mean(list(values.values()))) <= 1.96 * spread / math.sqrt(60)
    assert 0.93 <= covered / repetitions < 1
    assert independent / repetitions < 0.8


def test_the_jackknife_has_no_ends_where_it_cannot() -> None:
    def of_two(kept: frozenset[int]) -> float | None:
        return 0.5 if len(kept) > 1 else None

    assert jackknife([1], lambda kept: 0.5) == Interval(0.5, -math.inf, math.inf, 1, 1, "seeds")
    found = jackknife([1, 2], of_two)
    assert found is not None
    assert not found.bounded
    assert jackknife([1], of_two) is None
    limited = jackknife([1, 2, 3], lambda kept: sum(kept) / 6, limits=(-1.0, 1.0))
    assert limited is not None
    assert limited.high == 1.0


def test_the_interval_of_a_slope_covers_the_truth() -> None:
    generator = np.random.default_rng(5)
    x = [0.0, 0.25, 0.5, 0.75, 1.0]
    covered = 0
    for _ in range(1000):
        found = slope_interval(x, list(0.4 * np.array(x) + generator.normal(0, 0.1, 5)))
        assert found is not None
        covered += found.low <= 0.4 <= found.high
    assert covered / 1000 == pytest.approx(0.95, abs=0.02)
    two = slope_interval([0, 1], [1, 3])
    assert two is not None
    assert two.value == pytest.approx(2)
    assert not two.bounded
    assert slope_interval([1, 1, 1], [0, 1, 2]) is None


def test_a_mean_of_what_is_not_all_known_is_not_known() -> None:
    assert mean_if_known([1.0, 3.0]) == 2.0
    assert mean_if_known([1.0, None]) is None
    assert mean_if_known([]) is None


def test_lines() -> None:
    line = fit_line([0, 1, 2], [1, 3, 5])
    assert line is not None
    assert (line.slope, line.intercept, line.r2) == pytest.approx((2, 1, 1))
    assert line.at(10) == pytest.approx(21)
    assert fit_line([1, 1], [0, 2]) is None
    assert fit_line([1], [0]) is None


def test_rank_correlation() -> None:
    # Equal values share the mean of their ranks: 1, 4, 2.5, 2.5 against 1, 2, 3, 4.
    tied = float(np.corrcoef([1, 4, 2.5, 2.5], [1, 2, 3, 4])[0, 1])
    assert rank_correlation([10, 30, 20, 20], [1, 2, 3, 4]) == pytest.approx(tied)
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

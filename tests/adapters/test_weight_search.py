"""The search for weights, on functions whose minima are known."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest

from superpose_adapters.weight_search import Best, Point, Space, best_of, search


def rounds_of(
    function: Callable[[Any], float], space: Space, budget: int, seed: int = 0
) -> list[dict[Point, float]]:
    """Return what each round asked for, with what it was told."""
    rounds = search(space, budget, seed)
    found: list[dict[Point, float]] = []
    points: Sequence[Point] = next(rounds)
    while True:
        found.append({point: float(function(np.asarray(point))) for point in points})
        try:
            points = rounds.send(list(found[-1].values()))
        except StopIteration:
            return found


def minimum(
    function: Callable[[Any], float], space: Space, budget: int = 60, seed: int = 0
) -> Best:
    losses: dict[Point, float] = {}
    for each in rounds_of(function, space, budget, seed):
        losses |= each
    best = best_of(losses, space)
    assert best.evaluations == len(losses) <= budget
    return best


CURVATURE = np.array([[2, 0.9, 0.3], [0.9, 1.5, -0.4], [0.3, -0.4, 1.0]])
LOWEST = np.array([0.61, -0.234, 1.4])


def quadratic(w: Any) -> float:
    return float(3 + (w - LOWEST) @ CURVATURE @ (w - LOWEST) / 2)


def test_a_quadratic_is_found_exactly() -> None:
    assert minimum(quadratic, Space(3, penalty=0)).point == pytest.approx(LOWEST, abs=2e-3)


def test_the_penalty_moves_the_minimum_as_it_should() -> None:
    # Where no weight is 0 the gradient of the loss is -penalty * sign.
    moved = LOWEST - 0.05 * np.linalg.solve(CURVATURE, np.sign(LOWEST))
    assert minimum(quadratic, Space(3, penalty=0.05)).point == pytest.approx(moved, abs=5e-3)


def test_a_curved_valley() -> None:
    def banana(w: Any) -> float:
        return float((0.7 - w[0]) ** 2 + 10 * (w[1] - w[0] ** 2) ** 2)

    best = minimum(banana, Space(2, penalty=0), budget=100)
    assert best.loss < 2e-3
    assert best.point == pytest.approx((0.7, 0.49), abs=0.06)


def test_a_loss_that_grows_as_those_of_mixes_do() -> None:
    def growing(w: Any) -> float:
        return math.log(math.exp(2 * float(((w - 0.4) ** 2).sum())) + 5)

    for dimensions in (1, 2, 5, 8):
        best = minimum(growing, Space(dimensions, penalty=0), budget=20 + 10 * dimensions)
        assert best.loss < math.log(6) * 1.002


@pytest.mark.parametrize(("low", "high"), [(-1.0, 2.0), (0.25, 0.5), (-3.0, -2.5)])
def test_a_minimum_beyond_the_bounds_is_found_at_them(low: float, high: float) -> None:
    space = Space(3, low, high, penalty=0)
    best = minimum(lambda w: float(((w - 3) ** 2).sum()), space)
    assert best.point == (high,) * 3
    for each in rounds_of(quadratic, space, 60):
        assert all(low <= weight <= high for point in each for weight in point)


def test_what_changes_nothing_gets_no_weight() -> None:
    best = minimum(lambda w: float((w[0] - 0.5) ** 2), Space(3, penalty=0.01))
    assert best.point == pytest.approx((0.495, 0, 0), abs=2e-3)
    assert best.point[1:] == (0.0, 0.0)


@pytest.mark.parametrize(
    "function",
    [
        lambda w: 1.0,
        lambda w: math.floor(4 * float(np.abs(w - 0.6).sum())),
        lambda w: math.nan,
        lambda w: math.nan if w.sum() > 1.2 else float(((w - 0.7) ** 2).sum()),
        lambda w: math.inf if w[0] == 0 else float((w**2).sum()),
    ],
)
def test_plateaus_and_holes_end(function: Callable[[Any], float]) -> None:
    best = minimum(function, Space(2), budget=80)
    losses = [function(np.array([i, j]) / 2) for i in range(3) for j in range(3)]
    finite = [loss for loss in losses if math.isfinite(loss)]
    assert math.isnan(best.loss) if not finite else best.loss <= min(finite) + 0.04


def test_of_equal_points_the_smallest_weights_are_best() -> None:
    assert minimum(lambda w: 1.0, Space(3, penalty=0)).point == (0, 0, 0)


@pytest.mark.parametrize("budget", [1, 3, 7, 20])
def test_no_more_is_asked_for_than_the_budget_and_nothing_twice(budget: int) -> None:
    rounds = rounds_of(quadratic, Space(3), budget)
    points = [point for each in rounds for point in each]
    assert len(points) == len(set(points)) == budget


def test_the_first_round_has_what_people_try_first() -> None:
    first = set(rounds_of(quadratic, Space(3), 40)[0])
    assert first >= {(0, 0, 0), (1, 1, 1), (0.5,) * 3, (1, 0, 0), (0, 1, 0), (0, 0, 1)}


def test_a_seed_gives_the_same_search() -> None:
    assert rounds_of(quadratic, Space(3), 40, 5) == rounds_of(quadratic, Space(3), 40, 5)
    assert rounds_of(quadratic, Space(3), 40, 5) != rounds_of(quadratic, Space(3), 40, 6)

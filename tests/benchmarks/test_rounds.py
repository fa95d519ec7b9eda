from __future__ import annotations

import math
import statistics

import pytest
from benchmarks.rounds import run_rounds
from benchmarks.spread import Spread, percentile
from hypothesis import given
from hypothesis import strategies as st

values = st.lists(st.floats(-1e6, 1e6), min_size=2)


@given(values)
def test_the_quartiles_are_those_of_the_standard_library(numbers: list[float]) -> None:
    spread = Spread.of(numbers)
    expected = statistics.quantiles(numbers, n=4, method="inclusive")
    assert (spread.lower, spread.median, spread.upper) == pytest.approx(expected)
    assert spread.count == len(numbers)


@given(values)
def test_the_ends_are_the_extremes(numbers: list[float]) -> None:
    assert percentile(numbers, 0) == min(numbers)
    assert percentile(numbers, 100) == max(numbers)


def test_nothing_has_no_percentile() -> None:
    assert math.isnan(percentile([], 50))


class Machine:
    """A clock that only contestants move, and a log of who ran."""

    def __init__(self) -> None:
        self.time = 0.0
        self.log: list[str] = []

    def clock(self) -> float:
        return self.time

    def run(self, name: str, seconds: float) -> float:
        self.time += seconds
        self.log.append(name)
        return seconds


def test_contestants_take_turns_and_another_one_begins_each_round() -> None:
    machine = Machine()
    contestants = {name: (lambda name=name: machine.run(name, 1.0)) for name in "abc"}
    rounds = run_rounds(contestants, seconds=0, warm_up=1, least=3, clock=machine.clock)
    # The warm-up begins with the last one, so that the first round begins with the first.
    assert machine.log == list("cab" + "abc" + "bca" + "cab")
    assert rounds.values == {name: [1.0] * 3 for name in "abc"}
    assert rounds.count == 3


@pytest.mark.parametrize(("seconds", "expected"), [(0, 3), (45, 4), (1000, 10)])
def test_no_round_begins_that_would_end_after_the_budget(seconds: float, expected: int) -> None:
    machine = Machine()
    contestants = {"a": lambda: machine.run("a", 4.0), "b": lambda: machine.run("b", 5.0)}
    rounds = run_rounds(
        contestants, seconds=seconds, warm_up=1, least=3, most=10, clock=machine.clock
    )
    assert rounds.count == expected


def test_a_ratio_is_taken_round_by_round() -> None:
    """A machine that becomes ten times slower half-way changes no ratio."""
    machine = Machine()
    speeds = iter([1.0, 1.0, 1.0, 1.0, 10.0, 10.0, 10.0, 10.0])

    def slow() -> float:
        return machine.run("slow", 3.0 * next(speeds))

    def fast() -> float:
        return machine.run("fast", 2.0 * next(speeds))

    rounds = run_rounds(
        {"slow": slow, "fast": fast}, seconds=0, warm_up=0, least=4, clock=machine.clock
    )
    ratio = rounds.ratio("slow", "fast")
    assert (ratio.lower, ratio.median, ratio.upper, ratio.count) == (1.5, 1.5, 1.5, 4)

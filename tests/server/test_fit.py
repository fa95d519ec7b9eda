"""Which rows are held out of a fit, and how sure its figures are."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable

import numpy as np
import pytest

from superpose_server.engine.score import ScoreRow
from superpose_server.errors import InvalidArgument
from superpose_server.inference.fit import Sample, _estimate, _resampled
from superpose_server.inference.request import QuestionAnswer, ScoreItem


def sample(items: list[ScoreItem], bare: frozenset[int] = frozenset()) -> Sample:
    """Split items, each a row of its own number; those in `bare` have nothing to score.

    Whichever side a row is on, its place among the items is its number.
    """
    rows = [ScoreRow((i, i), first=2 if i in bare else 1) for i in range(len(items))]
    split = Sample.of(items, rows)
    assert all(row.ids[0] == place for place, row in split.held_out.items())
    return split


def numbers(rows: Iterable[ScoreRow]) -> set[int]:
    return {row.ids[0] for row in rows}


@pytest.mark.parametrize("count", [2, 3, 8, 48, 256])
def test_about_a_third_is_held_out(count: int) -> None:
    names = ["".join(chr(97 + int(digit)) for digit in str(i)) for i in range(count)]
    split = sample([QuestionAnswer(f"what is {name}?", "b") for name in names])
    assert len(split.held_out) == max(1, count // 3)
    assert numbers(split.fitted) | numbers(split.held_out.values()) == set(range(count))
    assert len(split.fitted) + len(split.held_out) == count


def test_twins_stay_on_one_side() -> None:
    letters = "abcdefghij"
    questions: list[ScoreItem] = []
    for twin in range(3):
        questions += [QuestionAnswer(f"What  is {x} + {twin}?", str(twin)) for x in letters]
    split = sample(questions)
    sides = (split.fitted, split.held_out.values())
    of_twins = [{row.ids[0] % 10 for row in side} for side in sides]
    assert not of_twins[0] & of_twins[1]
    assert len(split.held_out) == 9
    groups = dict(zip(split.held_out, split.groups, strict=True))
    assert {groups[place] for place in groups} == {0, 1, 2}
    assert all(groups[place] == groups[place % 10] for place in groups)


@pytest.mark.parametrize(
    ("counts", "thirds"),
    [
        ((48, 48, 48), (16, 16, 16)),
        ((9, 3, 30), (3, 1, 10)),
        ((4, 5), (1, 2)),
        ((2, 2, 2), (1, 1, 0)),
    ],
)
def test_of_each_source_about_a_third_is_held_out(
    counts: tuple[int, ...], thirds: tuple[int, ...]
) -> None:
    sources = [source for source, count in enumerate(counts) for _ in range(count)]
    names = ["".join(chr(97 + int(digit)) for digit in str(i)) for i in range(len(sources))]
    rows = [ScoreRow((i, i)) for i in range(len(sources))]
    split = Sample.of(names, rows, sources)
    held_out = Counter(sources[place] for place in split.held_out)
    assert tuple(held_out[source] for source in range(len(counts))) == thirds


def test_twins_of_two_sources_stay_on_one_side() -> None:
    letters = "abcdefghi"
    texts = [f"{letter} {source}" for source in range(2) for letter in letters]
    rows = [ScoreRow((i, i)) for i in range(18)]
    split = Sample.of(texts, rows, [0] * 9 + [7] * 9)
    assert len(split.held_out) == 6
    assert {place % 9 for place in split.held_out} == {
        place for place in split.held_out if place < 9
    }


def test_the_sides_do_not_depend_on_the_order() -> None:
    texts = [f"text {chr(97 + i)}" for i in range(20)]
    split, back = sample([*texts]), sample([*texts[::-1]])
    assert set(split.held_out) == {19 - i for i in back.held_out}


def test_rows_without_a_token_that_counts_are_left_out() -> None:
    split = sample(["a", "b", "c", "d"], bare=frozenset({1, 2}))
    assert numbers(split.fitted) | numbers(split.held_out.values()) == {0, 3}


@pytest.mark.parametrize("items", [["a"], ["a 1", "A  2", "a 3"], [[1, 2], [1, 2]]])
def test_nothing_but_twins_cannot_be_split(items: list[ScoreItem]) -> None:
    with pytest.raises(InvalidArgument, match="1 different rows"):
        sample(items)


def test_intervals_are_those_of_a_mean() -> None:
    random = np.random.default_rng(0)
    nats = random.normal(3.0, 0.5, (2, 400))
    nats[1] = nats[0] + 0.1 + random.normal(0, 0.01, 400)
    draws = _resampled(nats, np.ones(400), np.arange(400), 1)
    found = _estimate(float(nats[0].mean()), draws[:, 0])
    half = 1.96 * float(nats[0].std()) / math.sqrt(400)
    assert (found.low, found.high) == pytest.approx(
        (found.value - half, found.value + half), abs=0.01
    )
    # What two mixes share, their difference does not: it is paired.
    excess = _estimate(0.1, draws[:, 1] - draws[:, 0])
    assert excess.high - excess.low < 0.003
    assert excess.low < 0.1 < excess.high


def test_means_are_over_tokens_and_twins_are_drawn_together() -> None:
    draws = _resampled(
        np.array([[1.0, 2.0, 30.0]]), np.array([1.0, 1.0, 10.0]), np.array([0, 0, 1]), 0
    )
    assert {round(float(mean), 6) for mean in draws[:, 0]} == {1.5, 2.75, 3.0}


def test_one_group_has_no_interval() -> None:
    draws = _resampled(np.array([[1.0, 2.0]]), np.ones(2), np.array([0, 0]), 0)
    assert math.isnan(_estimate(1.5, draws[:, 0]).low)

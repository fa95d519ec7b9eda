"""DO-Merging against its definition on whole deltas, in numpy."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.adapters.merge.dense import Matrix, decompose, plain_sum
from tests.adapters.merge.making import (
    deltas_of,
    distance,
    make_terms,
    merged_delta,
    weighted,
)

from superpose_adapters.merge.do_merging import DoMerging
from superpose_adapters.merge.methods import MethodError, read_method
from superpose_adapters.merge.term import Term


def halves(delta: Matrix) -> tuple[Matrix, Matrix]:
    """A and B of a delta, with a root of each singular value."""
    u, s, vh = decompose(delta)
    return np.diag(np.sqrt(s)) @ vh, u @ np.diag(np.sqrt(s))


def apart(factors: Sequence[Matrix], method: DoMerging) -> list[Matrix]:
    """Descend on the objective as it is written, pair by pair, in the full width."""
    size = np.linalg.norm(np.vstack(list(factors)), 2)
    start = [rows / size for rows in factors]
    moved = [rows.copy() for rows in start]
    for _ in range(method.steps):
        slopes = []
        for i, rows in enumerate(moved):
            slope = 2 * method.stay * (rows - start[i])
            for j, others in enumerate(moved):
                if j != i:
                    # |X Y^T|^2 stands in the sum as (i, j) and as (j, i).
                    slope = slope + 2 * 2 * rows @ others.T @ others
            slopes.append(slope)
        moved = [rows - method.step_size * slope for rows, slope in zip(moved, slopes, strict=True)]
    return [rows * size for rows in moved]


def by_definition(deltas: Sequence[Matrix], method: DoMerging) -> Matrix:
    split = [halves(delta) for delta in deltas]
    a = apart([a for a, _ in split], method)
    b = [rows.T for rows in apart([b.T for _, b in split], method)]
    moved = [left @ right for left, right in zip(b, a, strict=True)]
    lengths = [np.linalg.norm(delta, axis=0) for delta in moved]
    directions = [delta / length for delta, length in zip(moved, lengths, strict=True)]
    merged: Matrix = np.sum(directions, axis=0) * np.mean(lengths, axis=0)
    return merged


@pytest.mark.parametrize(
    "method",
    [DoMerging(), DoMerging(steps=0), DoMerging(stay=0.01, steps=7, step_size=0.2)],
    ids=["default", "no descent", "other options"],
)
@pytest.mark.parametrize("weights", [(1.0, 1.0, 1.0), (0.5, -1.0, 2.0)])
def test_it_is_what_its_definition_says(method: DoMerging, weights: tuple[float, ...]) -> None:
    terms = weighted(make_terms(3, [4, 2, 3]), weights)
    expected = by_definition(deltas_of(terms), method)
    assert distance(merged_delta(method, terms), expected) < 1e-9


def test_the_descent_lowers_what_it_minimises() -> None:
    a = [halves(delta)[0] for delta in deltas_of(make_terms(4, [3, 3]))]
    moved = apart(a, DoMerging())
    assert np.linalg.norm(moved[0] @ moved[1].T) < 0.2 * np.linalg.norm(a[0] @ a[1].T)


def test_columns_of_one_length_give_the_plain_sum() -> None:
    first = make_terms(5, [3])[0]
    generator = torch.Generator().manual_seed(5)
    turn = torch.linalg.qr(torch.randn(14, 14, generator=generator).double()).Q
    terms = [first, Term(1, first.a, turn @ first.b)]
    assert distance(merged_delta(DoMerging(steps=0), terms), plain_sum(deltas_of(terms))) < 1e-12


def test_the_size_of_a_weight_changes_magnitudes_alone() -> None:
    method = DoMerging(steps=0)
    terms = make_terms(6, [2, 2])
    large = merged_delta(method, weighted(terms, [1.0, 1.0]))
    small = merged_delta(method, weighted(terms, [1.0, 0.1]))
    ratios = np.linalg.norm(small, axis=0) / np.linalg.norm(large, axis=0)
    assert distance(small, large * ratios) < 1e-12
    assert (ratios < 1).all()


def test_deltas_that_do_not_overlap_stay_where_they_are() -> None:
    a, b = torch.eye(11).double(), torch.eye(14).double()
    terms = [Term(i, a[2 * i : 2 * i + 2], b[:, 2 * i : 2 * i + 2] * (i + 1)) for i in range(3)]
    found = merged_delta(DoMerging(), terms)
    assert distance(found, merged_delta(DoMerging(steps=0), terms)) < 1e-12


def test_one_adapter_is_itself() -> None:
    terms = weighted(make_terms(7, [4]), [-0.7])
    assert distance(merged_delta(DoMerging(), terms), deltas_of(terms)[0]) < 1e-12


def test_the_largest_step_does_not_diverge() -> None:
    first = make_terms(8, [4])[0]
    terms = [Term(i, first.a, first.b) for i in range(8)]
    found = merged_delta(DoMerging(step_size=0.2, stay=1.0, steps=1000), terms)
    assert np.linalg.norm(found) <= 8 * np.linalg.norm(deltas_of(terms)[0])


def test_nothing_of_nothing() -> None:
    term = make_terms(9, [2])[0]
    a, b = DoMerging().merge("x", 1, [Term(0, term.a, term.b * 0)])
    assert (a.shape, b.shape) == ((0, 11), (14, 0))


seeds = st.integers(0, 2**32 - 1)


@settings(max_examples=15)
@given(seed=seeds, ranks=st.lists(st.integers(1, 4), min_size=1, max_size=3))
def test_gauge_order_and_zeros_change_nothing(seed: int, ranks: list[int]) -> None:
    terms = make_terms(seed, ranks)
    expected = merged_delta(DoMerging(), terms)
    others = [Term(len(ranks), torch.ones(2, 11).double(), torch.zeros(14, 2).double())]
    generator = torch.Generator().manual_seed(seed)
    for i, term in enumerate(reversed(terms)):
        gauge = torch.randn(term.rank, term.rank, generator=generator).double() / 2
        gauge -= 2 * torch.eye(term.rank)
        others.append(Term(i, gauge @ term.a, term.b @ torch.linalg.inv(gauge)))
    assert distance(merged_delta(DoMerging(), others), expected) < 1e-6


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"stay": 0}, "do: stay is 0: use a number above 0, at most 1"),
        ({"steps": -1}, "do: steps is -1: use 0 to 10000"),
        ({"step_size": 0.3}, "do: step_size is 0.3: use a number above 0, at most 0.2"),
    ],
)
def test_options_out_of_range_are_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(MethodError) as caught:
        read_method("do", options)
    assert str(caught.value) == message

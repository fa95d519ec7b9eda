"""RegMean against numpy's inverse, and against the least squares that it solves."""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from tests.adapters.merge.dense import Matrix, plain_sum
from tests.adapters.merge.making import (
    MODULE,
    deltas_of,
    distance,
    make_terms,
    merged_delta,
    weighted,
)
from torch import Tensor

from superpose_adapters.merge.method import MergeError
from superpose_adapters.merge.regmean import RegMean


def inputs_of(seed: int, count: int, tokens: int = 40, width: int = 11) -> list[Tensor]:
    """Inputs (tokens, width) of some parts, with numbers that go together."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(count, width, width, generator=generator)
    return [torch.randn(tokens, width, generator=generator) @ each for each in mixing]


def moments_of(inputs: Sequence[Tensor]) -> list[Tensor]:
    # In float64 first: a product in float32 is not symmetric to the last bit on every processor.
    return [(x.double().T @ x.double() / len(x)).float() for x in inputs]


def by_definition(
    deltas: dict[int, Matrix], moments: Sequence[Tensor], off_diagonal: float
) -> Matrix:
    shrunk = []
    for moment in moments:
        dense = moment.numpy().astype(np.float64)
        shrunk.append(np.where(np.eye(len(dense)) > 0, dense, off_diagonal * dense))
    weighted_sum = sum(delta @ shrunk[part] for part, delta in deltas.items())
    merged: Matrix = weighted_sum @ np.linalg.inv(np.sum(shrunk, axis=0))
    return merged


@pytest.mark.parametrize("off_diagonal", [0.0, 0.6, 1.0])
def test_it_is_what_its_definition_says(off_diagonal: float) -> None:
    terms = weighted(make_terms(1, [4, 2, 3]), [1.0, -0.5, 2.0])
    # The part in the middle leaves the module alone, and yet has inputs there.
    terms = [terms[0], terms[2]]
    moments = moments_of(inputs_of(1, 3))
    method = RegMean(off_diagonal, {MODULE: moments})
    deltas = {term.part: delta for term, delta in zip(terms, deltas_of(terms), strict=True)}
    expected = by_definition(deltas, moments, off_diagonal)
    assert distance(merged_delta(method, terms, parts=3), expected) < 1e-9


def test_with_whole_moments_outputs_are_nearest_to_each_parts_own() -> None:
    terms = make_terms(2, [3, 2])
    inputs = inputs_of(2, 2)
    found = merged_delta(RegMean(1.0, {MODULE: moments_of(inputs)}), terms)
    seen = [x.numpy().astype(np.float64) for x in inputs]
    wanted = [x @ delta.T for x, delta in zip(seen, deltas_of(terms), strict=True)]
    nearest = np.linalg.lstsq(np.vstack(seen), np.vstack(wanted), rcond=None)[0].T
    # Moments are float32.
    assert distance(found, nearest) < 1e-4


def test_equal_moments_give_the_mean_of_all_parts() -> None:
    terms = make_terms(3, [3, 2])
    for moment in (torch.eye(11), moments_of(inputs_of(3, 1))[0]):
        found = merged_delta(RegMean(moments={MODULE: [moment] * 3}), terms, parts=3)
        assert distance(found, plain_sum(deltas_of(terms)) / 3) < 1e-9


def test_one_adapter_is_itself() -> None:
    terms = weighted(make_terms(4, [4]), [-0.7])
    method = RegMean(moments={MODULE: moments_of(inputs_of(4, 1))})
    assert distance(merged_delta(method, terms), deltas_of(terms)[0]) < 1e-9


def test_an_input_that_is_always_zero_gets_nothing() -> None:
    terms = make_terms(5, [2, 2])
    inputs = inputs_of(5, 2)
    for x in inputs:
        x[:, 3] = 0
    found = merged_delta(RegMean(moments={MODULE: moments_of(inputs)}), terms)
    assert not found[:, 3].any()
    others = [i for i in range(11) if i != 3]
    moments = [x[:, others] for x in inputs]
    narrow = [type(term)(term.part, term.a[:, others], term.b) for term in terms]
    method = RegMean(moments={MODULE: moments_of(moments)})
    assert distance(found[:, others], merged_delta(method, narrow)) < 1e-9


@pytest.mark.parametrize("tokens", [4, 5])
def test_too_few_inputs_are_refused_unless_numbers_off_the_diagonal_shrink(tokens: int) -> None:
    terms = make_terms(6, [2, 2])
    moments = moments_of(inputs_of(6, 2, tokens))
    message = f"regmean: the rows do not tell the 11 inputs of {MODULE} apart: give more of them"
    with pytest.raises(MergeError, match=re.escape(message)):
        merged_delta(RegMean(1.0, {MODULE: moments}), terms)
    deltas = dict(enumerate(deltas_of(terms)))
    found = merged_delta(RegMean(0.6, {MODULE: moments}), terms)
    assert distance(found, by_definition(deltas, moments, 0.6)) < 1e-9


@pytest.mark.parametrize(("apart", "refused"), [(0.1, False), (1e-3, True)])
def test_inputs_that_rounding_confuses_are_refused(apart: float, *, refused: bool) -> None:
    """Input 0 is the sum of the others but for a little, which no pair of them shows."""
    terms = make_terms(7, [2, 2])
    inputs = []
    for x in inputs_of(7, 2, 200):
        noise = torch.randn(len(x), generator=torch.Generator().manual_seed(7))
        x = torch.linalg.qr(x).Q * len(x) ** 0.5
        x[:, 0] = x[:, 1:].sum(1) + apart * noise
        inputs.append(x)
    method = RegMean(1.0, {MODULE: moments_of(inputs)})
    if refused:
        with pytest.raises(MergeError, match="do not tell the 11 inputs"):
            merged_delta(method, terms)
        return
    deltas = dict(enumerate(deltas_of(terms)))
    exact = [x.double() for x in inputs]
    found = merged_delta(method, terms)
    assert distance(found, by_definition(deltas, moments_of(exact), 1.0)) < 1e-2


def test_an_option_out_of_range_is_refused() -> None:
    with pytest.raises(ValueError, match=r"^off_diagonal is 1.5: use 0 to 1$"):
        RegMean(1.5)

"""LoRAHub's sums of factors, given their weights. The search: tests/train/test_merging.py."""

from __future__ import annotations

import numpy as np
import pytest
from tests.adapters.merge.dense import plain_sum
from tests.adapters.merge.making import (
    MODULE,
    deltas_of,
    distance,
    make_part,
    make_terms,
    merged_delta,
    weighted,
)

from superpose_adapters.merge.lorahub import LoraHub
from superpose_adapters.merge.merge import merge
from superpose_adapters.merge.method import MergeError
from superpose_adapters.merge.term import Term


def test_every_b_meets_every_a() -> None:
    terms = weighted(make_terms(1, [3, 3, 3]), [1.0, -0.5, 2.0])
    weights = (0.4, -1.1, 0.7)
    expected = np.zeros((14, 11))
    for v, one in zip(weights, terms, strict=True):
        for w, other in zip(weights, terms, strict=True):
            expected += v * w * one.b.numpy() @ other.a.numpy()
    assert distance(merged_delta(LoraHub(weights=weights), terms), expected) < 1e-12


def test_one_and_nothing_is_the_first_adapter() -> None:
    terms = make_terms(2, [3, 3])
    first, second = deltas_of(terms)
    assert distance(merged_delta(LoraHub(weights=(1.0, 0.0)), terms), first) < 1e-12
    # Its sign is lost, and half of it is a quarter.
    assert distance(merged_delta(LoraHub(weights=(0.0, -0.5)), terms), 0.25 * second) < 1e-12


def test_it_depends_on_how_a_delta_is_divided() -> None:
    first, second = make_terms(3, [3, 3])
    turned = Term(1, -second.a, -second.b)
    method = LoraHub(weights=(1.0, 1.0))
    one, other = merged_delta(method, [first, second]), merged_delta(method, [first, turned])
    assert distance(other, one) > 0.5
    # What they have in common is the sum; the cross terms turn round.
    assert distance((one + other) / 2, plain_sum(deltas_of([first, second]))) < 1e-12


def test_a_part_without_the_module_adds_nothing() -> None:
    first, _, third = make_terms(4, [3, 3, 3])
    found = merged_delta(LoraHub(weights=(0.5, 9.0, 1.5)), [first, third], parts=3)
    expected = merged_delta(LoraHub(weights=(0.5, 1.5)), [first, Term(1, third.a, third.b)])
    assert distance(found, expected) < 1e-12


def test_weights_of_zero_leave_nothing() -> None:
    parts = [
        make_part(d, {MODULE: (t.a, t.b)}) for d, t in zip("ab", make_terms(5, [3, 3]), strict=True)
    ]
    assert merge(parts, LoraHub(weights=(0.0, 0.0))) == {}


def test_ranks_that_differ_are_refused() -> None:
    message = f"^lorahub adds A's to A's, and {MODULE} has ranks 2, 3: merge adapters of one rank$"
    with pytest.raises(MergeError, match=message):
        LoraHub(weights=(1.0, 1.0)).merge(MODULE, 2, make_terms(6, [3, 2]))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"evaluations": 0}, "evaluations is 0: use 1 to 10000"),
        ({"penalty": -1.0}, "penalty is -1: use 0 to 100"),
        ({"seed": -1}, "seed is -1: use 0 to 2\\*\\*32 - 1"),
    ],
)
def test_options_out_of_range_are_refused(options: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}$"):
        LoraHub(**options)  # type: ignore[arg-type]

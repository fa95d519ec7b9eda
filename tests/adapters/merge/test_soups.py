"""LoRA Soups' sum, given its weights. How they are learned: tests/train/test_merging.py."""

from __future__ import annotations

import pytest
from tests.adapters.merge.dense import plain_sum
from tests.adapters.merge.making import (
    MODULE,
    deltas_of,
    distance,
    make_terms,
    merged_delta,
    weighted,
)

from superpose_adapters.merge.soups import Soups


def test_weights_of_one_are_the_plain_sum() -> None:
    terms = weighted(make_terms(1, [4, 2, 3]), [1.0, -0.5, 2.0])
    found = merged_delta(Soups(weights={MODULE: [1.0, 1.0, 1.0]}), terms)
    assert distance(found, plain_sum(deltas_of(terms))) < 1e-12


def test_each_part_has_its_weight_in_each_module() -> None:
    first, _, third = make_terms(2, [4, 2, 3])
    method = Soups(weights={MODULE: [0.3, 0.0, -1.2], "other": [9.0, 9.0, 9.0]})
    found = merged_delta(method, [first, third], parts=3)
    one, other = deltas_of([first, third])
    assert distance(found, 0.3 * one - 1.2 * other) < 1e-12


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": -1}, "steps is -1: use 0 to 1000000"),
        ({"batch_size": 0}, "batch_size is 0: use 1 to 10000"),
        ({"learning_rate": 0.0}, "learning_rate is 0: use a number above 0, at most 1"),
        ({"seed": -1}, "seed is -1: use 0 to 2\\*\\*32 - 1"),
    ],
)
def test_options_out_of_range_are_refused(options: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}$"):
        Soups(**options)  # type: ignore[arg-type]

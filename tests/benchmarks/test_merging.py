from __future__ import annotations

import math

import pytest
from benchmarks.merging import best_factor, is_for_choosing

from superpose_adapters.bundled import BUNDLES, DOMAINS
from superpose_adapters.qa import read_rows


@pytest.mark.parametrize("best", [0.01, 0.19, 0.5, 0.9, 3.1, 50.0])
def test_the_best_factor_is_found(best: float) -> None:
    factor, tried = best_factor(lambda factor: abs(math.log(factor / best)))
    nearest = min(max(best, 0.125 / 2), 8)
    assert abs(math.log2(factor / nearest)) <= 0.13
    assert min(tried, key=tried.__getitem__) == factor
    assert len(tried) <= 12


def test_a_loss_that_is_not_finite_is_not_the_best() -> None:
    factor, _ = best_factor(lambda factor: math.inf if factor >= 0.5 else 1 / factor)
    assert 0.4 < factor < 0.5


@pytest.mark.parametrize("name", BUNDLES)
def test_rows_for_choosing_are_about_half_of_each_domain(name: str) -> None:
    for domain in DOMAINS:
        rows = read_rows(BUNDLES[name].held_out(domain))
        chosen = sum(is_for_choosing(row.question) for row in rows)
        assert 0.3 < chosen / len(rows) < 0.7


def test_twins_are_on_one_side() -> None:
    assert is_for_choosing("What is 3 times 4?") == is_for_choosing("what  is 17 times 5?")

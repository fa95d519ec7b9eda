"""Which methods and options there are, and what is said of others."""

from __future__ import annotations

import pytest

from superpose_adapters.merge.methods import METHODS, MethodError, read_method
from superpose_adapters.merge.ties import CoreTies


def test_a_method_is_read_with_its_defaults_and_as_json_writes_numbers() -> None:
    assert read_method("core-ties", {}) == CoreTies(density=0.2, join="mean")
    assert read_method("core-ties", {"density": 1, "join": "sum"}) == CoreTies(1.0, "sum")
    assert read_method("svd", {"rank": 4.0}).options == {"rank": 4}
    assert read_method("core-dare", {"seed": 3}).options == {"density": 0.5, "seed": 3}


def test_each_is_called_by_its_word() -> None:
    words = "sum mean cat svd core-tsv core-iso core-ties core-dare core-magnitude knots-ties"
    assert set(words.split()) <= set(METHODS)
    for name in METHODS:
        assert read_method(name, {}).name == name


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("linear", {}, "no method is called 'linear': use sum, mean, cat, svd"),
        ("sum", {"density": 0.5}, "sum has no option 'density'; its options: none"),
        ("core-ties", {"lambda": 1}, "no option 'lambda'; its options: density, join"),
        ("core-ties", {"density": "x"}, "core-ties: density is 'x': use a number"),
        ("core-ties", {"density": True}, "core-ties: density is 'True': use a number"),
        ("core-ties", {"density": float("nan")}, "core-ties: density is 'nan': use a number"),
        ("core-ties", {"density": 0}, "core-ties: density is 0.0: use above 0 and at most 1"),
        ("knots-ties", {"density": 1.5}, "density is 1.5: use above 0 and at most 1"),
        ("core-dare", {"density": -0.1}, "density is -0.1: use above 0 and at most 1"),
        ("core-magnitude", {"density": 2}, "density is 2.0: use above 0 and at most 1"),
        ("core-dare", {"seed": 0.5}, "core-dare: seed is '0.5': use a whole number"),
        ("core-dare", {"seed": -3}, "core-dare: seed is -3: use 0 to 2**32 - 1"),
        ("core-ties", {"join": "max"}, "core-ties: join is 'max': use mean or sum"),
        ("core-ties", {"join": 1}, "core-ties: join is '1': use a word"),
        ("svd", {"rank": -1}, "svd: rank is -1: use a rank, or 0 for the adapters' largest"),
        ("svd", {"rank": 2**53}, "svd: rank is beyond 2^53"),
        ("core-ties", {"density": 10**400}, "core-ties: density is beyond 2^53"),
        ("svd", {"rank": 2.5}, "svd: rank is '2.5': use a whole number"),
    ],
)
def test_what_there_is_not_is_refused(name: str, options: dict[str, object], message: str) -> None:
    with pytest.raises(MethodError) as caught:
        read_method(name, options)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)

"""Options of a merge method as they are written on a command line."""

from __future__ import annotations

import pytest

from superpose_adapters.option_syntax import parse_options


def test_values_are_numbers_truth_values_and_words() -> None:
    written = ["density=0.2", "seed=3", "scale=-1e-3", "signs=true", "deep=false", "join=a=b"]
    options = parse_options(written)
    assert options == {
        "density": 0.2,
        "seed": 3,
        "scale": -0.001,
        "signs": True,
        "deep": False,
        "join": "a=b",
    }
    assert [type(value) for value in options.values()] == [float, int, float, bool, bool, str]
    assert parse_options([]) == {}


@pytest.mark.parametrize("text", ["", "density", "=0.2", "density="])
def test_what_is_no_option_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"is no NAME=VALUE, as in density=0\.2"):
        parse_options([text])


def test_an_option_is_given_once() -> None:
    with pytest.raises(ValueError, match="'seed' is given twice"):
        parse_options(["seed=1", "seed=1"])


@pytest.mark.parametrize("number", [2**53, -(2**53), 10**400])
def test_a_whole_number_that_doubles_leave_out_is_refused(number: int) -> None:
    with pytest.raises(ValueError, match="'seed' is beyond 2\\^53"):
        parse_options([f"seed={number}"])
    assert parse_options([f"seed={2**53 - 1}"]) == {"seed": 2**53 - 1}

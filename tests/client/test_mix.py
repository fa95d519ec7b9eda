"""The client's face of the MIX syntax, which tests/adapters/test_mix_syntax.py checks."""

import pytest

from superpose_client.errors import MixSyntaxError, SuperposeError
from superpose_client.mix import format_mix, parse_mix


def test_mixes_are_read_and_written() -> None:
    assert parse_mix("math;medicine=0.5") == {"math": 1.0, "medicine": 0.5}
    assert parse_mix("default") is None
    assert format_mix({"math": 1, "medicine": 0.5}) == "math=1,medicine=0.5"


def test_bad_syntax_is_an_error_of_the_client_and_a_value_error() -> None:
    with pytest.raises(MixSyntaxError, match="mix 'math,': part 2 is empty") as raised:
        parse_mix("math,")
    assert isinstance(raised.value, SuperposeError)
    assert isinstance(raised.value, ValueError)

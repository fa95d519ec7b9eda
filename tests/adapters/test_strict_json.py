from __future__ import annotations

import json
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from superpose_adapters.strict_json import StrictJsonError, read_object

values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=10,
)


@given(st.dictionaries(st.text(), values))
def test_an_object_is_read_as_it_is(value: dict[str, object]) -> None:
    assert read_object(json.dumps(value).encode()) == value


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"", "is not JSON (JSONDecodeError)"),
        (b'{"a": 1} x', "is not JSON (JSONDecodeError)"),
        (b"\xff{}", "is not JSON (UnicodeDecodeError)"),
        (b'{"a":' * 100_000, "is not JSON (RecursionError)"),
        (b'{"a": ' + b"9" * 10_000 + b"}", "is not JSON (ValueError)"),
        (b'{"a": ' + b"[" * 64 + b"]" * 64 + b"}", "is nested more than 64 deep"),
        (b'{"a": ' + b'{"b": ' * 64 + b"1" + b"}" * 65, "is nested more than 64 deep"),
        (b"[1]", "is not a JSON object"),
        (b"null", "is not a JSON object"),
        (b'{"a": 1, "a": 1}', 'names "a" twice'),
        (b'{"b": [{"a": 1, "\\u0061": 2}]}', 'names "a" twice'),
        (b'{"a": NaN}', "holds NaN: use finite numbers"),
        (b'{"a": [-Infinity]}', "holds -Infinity: use finite numbers"),
        (b'{"a": ["\\ud800"]}', "holds half a character"),
        (b'{"\\uDC00 \\uD800": 1}', "holds half a character"),
    ],
)
def test_what_does_not_mean_one_thing_is_refused(text: bytes, message: str) -> None:
    with pytest.raises(StrictJsonError, match=re.escape(message)):
        read_object(text)


def test_what_is_nested_64_deep_or_side_by_side_is_read() -> None:
    for text in (b'{"a": ' + b"[" * 63 + b"]" * 63 + b"}", b'{"a": [' + b"{}," * 999 + b"{}]}"):
        assert read_object(text) == json.loads(text)


def test_characters_may_be_escaped_in_two_halves() -> None:
    assert read_object(b'{"\\ud83d\\ude00": "\\u00e9"}') == {"\U0001f600": "\u00e9"}


def test_a_long_name_makes_a_short_line() -> None:
    name = b'"' + b"x" * 10_000 + b'"'
    with pytest.raises(StrictJsonError) as raised:
        read_object(b"{" + name + b": 1," + name + b": 2}")
    assert len(str(raised.value)) < 200

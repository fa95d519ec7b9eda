"""What a followed file may say, and what it is refused for."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from superpose_adapters.mix_syntax import MAX_ABS_WEIGHT, NAME_PATTERN, RESERVED_NAMES
from superpose_server.control.mix_file import MOST_BYTES, MixFile, MixFileError, parse_mix_file

DIGEST = "0123456789abcdef" * 4
names = st.from_regex(NAME_PATTERN, fullmatch=True).filter(lambda name: name not in RESERVED_NAMES)
weights = st.integers(-10_000, 10_000) | st.floats(-MAX_ABS_WEIGHT, MAX_ABS_WEIGHT)
mixes = st.dictionaries(names, weights, max_size=4)
digests = st.text("0123456789abcdef", min_size=64, max_size=64)


@given(
    mixes,
    st.none() | st.dictionaries(names, mixes, max_size=4),
    st.none() | st.dictionaries(names, digests, max_size=4),
)
def test_what_is_written_is_what_is_read(
    mix: dict[str, float],
    named: dict[str, dict[str, float]] | None,
    adapters: dict[str, str] | None,
) -> None:
    said = {"mix": mix, "named_mixes": named, "adapters": adapters}
    text = json.dumps({name: value for name, value in said.items() if value is not None})
    assert parse_mix_file(text.encode()) == MixFile(mix, named, adapters or {})


def test_nothing_said_of_names_is_not_that_there_are_none() -> None:
    assert parse_mix_file(b'{"mix": {}}').named_mixes is None
    assert parse_mix_file(b'{"mix": {}, "named_mixes": {}}').named_mixes == {}


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ({}, 'it has no "mix": write {} for the base model'),
        ({"mix": None}, "mix: None is no mix in JSON"),
        ({"mix": "math=1"}, "mix: 'math=1' is no mix in JSON"),
        ({"mix": {"math": "1"}}, "mix: weight of math is '1': write a number"),
        ({"mix": {"math": True}}, "mix: weight of math is True: write a number"),
        ({"mix": {"math": 10_001}}, "mix: weight of math is 10001: use a number between"),
        ({"mix": {"Math": 1}}, "mix: 'Math' is not a valid name"),
        ({"mix": {"base": 1}}, "mix: 'base' is reserved for the base model"),
        ({"mix": {}, "mixes": {}}, 'field "mixes" is not known: use mix, named_mixes and adapters'),
        ({"mix": {}, "a\nb": {}}, 'field "a\\nb" is not known'),
        ({"mix": {}, "named_mixes": None}, "named_mixes is null: write an object of names"),
        ({"mix": {}, "named_mixes": {"default": {}}}, "named_mixes: 'default' is reserved"),
        ({"mix": {}, "named_mixes": {"qa": []}}, "named mix qa: [] is no mix in JSON"),
        ({"mix": {}, "named_mixes": {"qa": {"b c": 1}}}, "named mix qa: 'b c' is not a valid name"),
        ({"mix": {}, "adapters": []}, "adapters is []: write an object of domains and digests"),
        ({"mix": {}, "adapters": {"../x": DIGEST}}, "adapters: '../x' is not a valid name"),
        ({"mix": {}, "adapters": {"math": 7}}, "adapters: digest of math is 7: write the 64 hex"),
        ({"mix": {}, "adapters": {"math": DIGEST[1:]}}, "adapters: digest of math is"),
        ({"mix": {}, "adapters": {"math": DIGEST.upper()}}, "adapters: digest of math is"),
        ({"mix": {}, "adapters": {"math": DIGEST + "\n"}}, "adapters: digest of math is"),
    ],
)
def test_what_means_nothing_is_refused_in_one_line(body: Any, words: str) -> None:
    with pytest.raises(MixFileError) as caught:
        parse_mix_file(json.dumps(body).encode())
    assert str(caught.value).startswith(words)
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (b"", "it is not JSON"),
        (b'{"mix": {"math": 1', "it is not JSON"),
        (b"[]", "it is not a JSON object"),
        (b'{"mix": {"math": NaN}}', "it holds NaN: use finite numbers"),
        (b'{"mix": {"math": 1, "math": 2}}', 'it names "math" twice'),
        (b'{"mix": {}, "mix": {"math": 1}}', 'it names "mix" twice'),
        (b'{"mix": {"math": 1e999}}', "mix: weight of math is inf"),
        (b'{"mix": ' + b"[" * 100 + b"]" * 100 + b"}", "it is nested more than 64 deep"),
        (b" " * (MOST_BYTES - 1) + b"{}", "it is larger than 4 MiB"),
    ],
)
def test_what_is_no_such_text_is_refused(text: bytes, words: str) -> None:
    with pytest.raises(MixFileError, match=f"^{words}"):
        parse_mix_file(text)

import json
import math
import re
import subprocess
import sys
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from superpose_adapters import mix_syntax
from superpose_adapters.mix_syntax import check_name, format_mix, mix_from_json, parse_mix

RESERVED = ("base", "default")
names = st.from_regex(r"[a-z0-9][a-z0-9._-]{0,63}", fullmatch=True).filter(
    lambda name: name not in RESERVED
)
weights = st.floats(-1e4, 1e4, allow_nan=False)


@pytest.mark.parametrize(
    ("text", "mix"),
    [
        ("base", {}),
        (" base ", {}),
        ("math", {"math": 1.0}),
        ("math,medicine", {"math": 1.0, "medicine": 1.0}),
        ("math=1,medicine=0.5", {"math": 1.0, "medicine": 0.5}),
        (" math = 1 , medicine=-.5 ", {"math": 1.0, "medicine": -0.5}),
        ("math=1e-3,x=+2.", {"math": 0.001, "x": 2.0}),
        ("math=0", {"math": 0.0}),
        ("math=-10000,x=1e4", {"math": -10000.0, "x": 10000.0}),
        ("0.a-b_c", {"0.a-b_c": 1.0}),
        ("default", None),
        (" default\n", None),
        ("base2,defaults", {"base2": 1.0, "defaults": 1.0}),
        ("math=1;medicine=0.5", {"math": 1.0, "medicine": 0.5}),
        ("math ; medicine=0.5, x", {"math": 1.0, "medicine": 0.5, "x": 1.0}),
        ("a" * 64, {"a" * 64: 1.0}),
        ("math\n", {"math": 1.0}),
        ("inf,nan", {"inf": 1.0, "nan": 1.0}),
    ],
)
def test_parse(text: str, mix: dict[str, float] | None) -> None:
    assert parse_mix(text) == mix


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("", "empty"),
        ("  ", "empty"),
        (",", "part 1"),
        ("math,", "part 2"),
        ("math,,x", "part 2"),
        ("math;", "part 2"),
        (";math", "part 1"),
        ("math,;x", "part 2"),
        ("Math", "'Math'"),
        ("math medicine", "'math medicine'"),
        ("=1", "''"),
        ("-math", "'-math'"),
        ("../math", "'../math'"),
        ("mäth", "'mäth'"),
        ("a" * 65, "'aaa"),
        ("math,math", "math is named twice"),
        ("math=1,x;math=2", "math is named twice"),
        ("base,math", "'base' means the base model: write it alone"),
        ("math;base", "'base' means the base model: write it alone"),
        ("base=1", "'base' means the base model"),
        ("default=1", "'default' means the default mix"),
        ("default,math=0.5", "'default' means the default mix: write it alone"),
        ("math=", "''"),
        ("math=x", "'x'"),
        ("math=1=2", "'1=2'"),
        ("math=1_0", "'1_0'"),
        ("math=\u0661", "'\u0661'"),
        ("math=0x1", "'0x1'"),
        ("math=1 2", "'1 2'"),
        ("math=nan", "nan"),
        ("math=-inf", "-inf"),
        ("math=Infinity", "Infinity"),
        ("math=1e400", "1e400"),
        ("math=10000.1", "10000.1"),
        ("math=-1e300", "-1e300"),
    ],
)
def test_bad_syntax_is_one_line_that_names_the_part(text: str, part: str) -> None:
    with pytest.raises(ValueError, match=re.escape(part)) as raised:
        parse_mix(text)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("text", ["x" * 10_000, "math=" + "9" * 10_000, "math," * 10_000])
def test_a_long_text_makes_a_short_line(text: str) -> None:
    with pytest.raises(ValueError, match="mix '") as raised:
        parse_mix(text)
    assert len(str(raised.value)) < 400


@pytest.mark.parametrize(
    ("mix", "text"),
    [
        ({}, "base"),
        ({"math": 1}, "math=1"),
        ({"math": 1.0, "medicine": 0.5}, "math=1,medicine=0.5"),
        ({"math": -2.0}, "math=-2"),
        ({"math": 0.1 + 0.2}, "math=0.30000000000000004"),
        ({"math": 1e-300}, "math=1e-300"),
    ],
)
def test_format(mix: dict[str, float], text: str) -> None:
    assert format_mix(mix) == text


@given(st.dictionaries(names, weights, max_size=5))
def test_what_is_formatted_reads_back(mix: dict[str, float]) -> None:
    assert parse_mix(format_mix(mix)) == mix


@given(
    st.dictionaries(names, weights, min_size=1, max_size=5),
    st.sampled_from([",", ";", " ,\t", " ; "]),
)
def test_semicolons_and_blanks_do_not_matter(mix: dict[str, float], separator: str) -> None:
    assert parse_mix(format_mix(mix).replace(",", separator)) == mix


@given(st.text(st.sampled_from("abe01=,;.- \n+sE_"), max_size=20))
def test_any_text_is_a_mix_or_a_syntax_error(text: str) -> None:
    try:
        mix = parse_mix(text)
    except ValueError:
        return
    assert mix is not None
    assert parse_mix(format_mix(mix)) == mix


# The form in JSON.


@given(st.dictionaries(names, weights | st.integers(-10_000, 10_000), max_size=5))
def test_a_mix_in_json_is_what_it_says(mix: dict[str, float]) -> None:
    read = mix_from_json(json.loads(json.dumps(mix)))
    assert read == mix
    assert all(type(weight) is float for weight in read.values())


@pytest.mark.parametrize(
    ("value", "part"),
    [
        (None, "None is no mix in JSON"),
        ("math", "'math' is no mix in JSON"),
        ([["math", 1]], "is no mix in JSON"),
        ({"math": True}, "weight of math is True: write a number"),
        ({"math": "1"}, "weight of math is '1': write a number"),
        ({"math": None}, "weight of math is None"),
        ({"math": {"medicine": 1}}, "weight of math is {'medicine': 1}"),
        ({"math": math.nan}, "weight of math is nan"),
        ({"math": math.inf}, "weight of math is inf"),
        ({"math": -10_001}, "weight of math is -10001"),
        ({"math": 10**400}, "weight of math is 1000"),
        ({"Math": 1}, "'Math' is not a valid name"),
        ({"": "x"}, "'' is not a valid name"),
        ({"base": 1}, "'base' is reserved for the base model"),
        ({"default": 1}, "'default' is reserved for the default mix"),
        ({"x" * 10_000: 1}, "is not a valid name"),
        ({"math": "x" * 10_000}, "weight of math is"),
        ("x" * 10_000, "is no mix in JSON"),
    ],
)
def test_what_is_no_mix_in_json_is_one_short_line(value: Any, part: str) -> None:
    with pytest.raises(ValueError, match=re.escape(part)) as raised:
        mix_from_json(value)
    assert "\n" not in str(raised.value)
    assert len(str(raised.value)) < 300


# Names.


@pytest.mark.parametrize(
    "name", ["", ".", "..", "../x", "a/b", "A", "-a", "a b", "a\n", "é", "a" * 65, "a\x00"]
)
def test_bad_names_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match="not a valid name"):
        check_name(name)


@pytest.mark.parametrize("name", ["a", "0", "a" * 64, "finance_stock-trading.v2", "base.1"])
def test_good_names_are_returned(name: str) -> None:
    assert check_name(name) == name


@pytest.mark.parametrize("name", RESERVED)
def test_words_of_the_syntax_name_nothing(name: str) -> None:
    with pytest.raises(ValueError, match=f"'{name}' is reserved for .*: choose another name"):
        check_name(name)


def test_the_syntax_needs_nothing_but_python() -> None:
    """Client and doors read mixes, so it may not wait for torch, nor for grpc."""
    subprocess.run([sys.executable, "-I", "-S", mix_syntax.__file__], check=True, timeout=60)

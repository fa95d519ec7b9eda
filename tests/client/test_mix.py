import pytest
from hypothesis import given
from hypothesis import strategies as st

from superpose_client.errors import MixSyntaxError, SuperposeError
from superpose_client.mix import format_mix, parse_mix

names = st.from_regex(r"[a-z0-9][a-z0-9._-]{0,63}", fullmatch=True)
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
        ("base=1", {"base": 1.0}),
        ("base=0.5,math", {"base": 0.5, "math": 1.0}),
        ("a" * 64, {"a" * 64: 1.0}),
        ("math\n", {"math": 1.0}),
        ("inf,nan", {"inf": 1.0, "nan": 1.0}),
    ],
)
def test_parse(text: str, mix: dict[str, float]) -> None:
    assert parse_mix(text) == mix


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("", "empty"),
        ("  ", "empty"),
        (",", "part 1"),
        ("math,", "part 2"),
        ("math,,x", "part 2"),
        ("Math", "'Math'"),
        ("math medicine", "'math medicine'"),
        ("=1", "''"),
        ("-math", "'-math'"),
        ("../math", "'../math'"),
        ("mäth", "'mäth'"),
        ("a" * 65, "'aaa"),
        ("math,math", "'math' appears twice"),
        ("math=1,x,math=2", "'math' appears twice"),
        ("base,math", "base=1"),
        ("math,base", "base=1"),
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
    with pytest.raises(MixSyntaxError) as raised:
        parse_mix(text)
    assert part in str(raised.value)
    assert "\n" not in str(raised.value)
    assert isinstance(raised.value, ValueError)
    assert isinstance(raised.value, SuperposeError)


@pytest.mark.parametrize(
    ("mix", "text"),
    [
        ({}, "base"),
        ({"math": 1}, "math=1"),
        ({"math": 1.0, "medicine": 0.5}, "math=1,medicine=0.5"),
        ({"base": 1.0}, "base=1"),
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


@given(st.dictionaries(names.filter(lambda name: name != "base"), weights, min_size=1, max_size=5))
def test_blanks_around_commas_do_not_matter(mix: dict[str, float]) -> None:
    assert parse_mix(format_mix(mix).replace(",", " ,\t")) == mix


@given(st.text(st.sampled_from("abe01=,.- \n+sE_"), max_size=20))
def test_any_text_is_a_mix_or_a_syntax_error(text: str) -> None:
    try:
        mix = parse_mix(text)
    except MixSyntaxError:
        return
    assert parse_mix(format_mix(mix)) == mix

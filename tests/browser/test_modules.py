"""Modules of the page that only compute, against the Python that means the same."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.browser.mixer import Mixer
from tests.integration.harness import Served

from superpose_adapters.mix_syntax import format_mix, parse_mix


class Modules:
    """Functions of the page's modules, called from Python."""

    def __init__(self, mixer: Mixer) -> None:
        self._page = mixer.page

    def call(self, module: str, code: str, *arguments: Any) -> Any:
        """Return `code`, an expression of `m`, the module, and `a`, the arguments."""
        program = f"async a => {{ const m = await import('./mixer/{module}.js'); return {code}; }}"
        return self._page.evaluate(program, list(arguments))


@pytest.fixture(scope="module")
def modules(chromium: Any, served: Served) -> Modules:
    mixer = Mixer(chromium.new_context().new_page(), f"http://{served.server.http_address}/")
    mixer.open()
    return Modules(mixer)


PARSE = "[...m.parseMix(a[0], new Map([['qa', new Map([['math', 2], ['law', 0.5]])]]), new Map())]"
NAMES = st.from_regex(r"[a-z0-9][a-z0-9._-]{0,8}", fullmatch=True).filter(
    lambda name: name not in ("base", "default", "qa")
)
WEIGHTS = st.floats(-1e4, 1e4).filter(bool)


@settings(max_examples=50, deadline=None)
@given(st.dictionaries(NAMES, WEIGHTS, min_size=1, max_size=5))
def test_mixes_are_written_and_read_as_in_python(modules: Modules, mix: dict[str, float]) -> None:
    assert dict(modules.call("mix", PARSE, format_mix(mix))) == mix
    written = modules.call("mix", "m.formatMix(m.mixOf(a[0]))", list(map(list, mix.items())))
    assert parse_mix(written) == mix


@pytest.mark.parametrize(
    "text",
    [
        *("", " ", ",", "math,", "=1", "math=", "math=x", "math=1,math=2", "Math=1", "math=1e5"),
        *("base,math", "default=1", "math=nan", "math=1_0", "math=0x10", "math=1 2", "math==1"),
    ],
)
def test_what_is_no_mix_is_none_on_the_page_either(modules: Modules, text: str) -> None:
    with pytest.raises(ValueError):  # noqa: PT011  # Its words are held elsewhere.
        parse_mix(text)
    caught = f"(() => {{ try {{ {PARSE}; return null; }} catch (e) {{ return e.message; }} }})()"
    assert "\n" not in modules.call("mix", caught, text)


@pytest.mark.parametrize(
    ("text", "mix"),
    [
        (" math = 1 ; medicine=.5 ", {"math": 1, "medicine": 0.5}),
        ("math,medicine=0", {"math": 1}),
        ("qa=0.5,law=-0.25", {"math": 1}),
        ("constructor=2", {"constructor": 2}),
        ("base", {}),
    ],
)
def test_names_stand_for_mixes_and_nothing_is_absent(
    modules: Modules, text: str, mix: dict[str, float]
) -> None:
    assert dict(modules.call("mix", PARSE, text)) == mix


WORDS = st.lists(st.sampled_from("abc"), max_size=9)


def longest_common(one: list[str], other: list[str]) -> int:
    if not one or not other:
        return 0
    if one[0] == other[0]:
        return 1 + longest_common(one[1:], other[1:])
    return max(longest_common(one[1:], other), longest_common(one, other[1:]))


@settings(max_examples=50, deadline=None)
@given(WORDS, WORDS)
def test_the_words_that_two_texts_share_are_one_text(
    modules: Modules, one: list[str], other: list[str]
) -> None:
    counts = modules.call("difference", "m.sharedBy(a[0])", [one, other])
    left, right = (
        [word for word, count in zip(text, shared, strict=True) if count == 1]
        for text, shared in zip((one, other), counts, strict=True)
    )
    assert left == right
    assert len(left) == longest_common(one, other)


def test_a_word_is_shared_by_so_many_others(modules: Modules) -> None:
    texts = [text.split() for text in ("the cat sat", "the dog sat", "the cat")]
    assert modules.call("difference", "m.sharedBy(a[0])", texts) == [[2, 1, 1], [2, 0, 1], [2, 1]]


@pytest.mark.parametrize("text", ["", "a", " a\n\tb ", "  ", "三 四"])
def test_pieces_are_the_text(modules: Modules, text: str) -> None:
    pieces = modules.call("difference", "m.pieces(a[0])", text)
    assert "".join(piece["text"] for piece in pieces) == text
    assert [piece["text"] for piece in pieces if piece["word"]] == text.split()


@settings(max_examples=50, deadline=None)
@given(st.floats(1, 1e9), st.floats(1.06, 1e100))
def test_a_chart_has_ticks_but_not_many(modules: Modules, middle: float, times: float) -> None:
    low, high = middle / times, middle * times
    ticks = modules.call("chart", "m.logarithmicTicks(a[0], a[1], 8)", low, high)
    assert 1 <= len(ticks) <= 8
    assert ticks == sorted(set(ticks))
    assert low <= ticks[0] <= ticks[-1] <= high


HISTORY = """(() => {
    const state = (generation, weight) =>
        ({ generation, digest: String(weight), mix: new Map(weight ? [['a', weight]] : []) });
    let history = m.EMPTY;
    for (const [event, generation, weight] of a[0]) {
        if (event === 'undo') history = m.moved(history, -1) ?? history;
        else if (event === 'redo') history = m.moved(history, 1) ?? history;
        else history = m[event](history, state(generation, weight));
    }
    return [history.states.map(each => Number(each.digest)), history.position];
})()"""

CHANGED = [("watched", 0, 0), ("watched", 1, 5)]
WENT_BACK = [*CHANGED, ("undo", 0, 0)]


@pytest.mark.parametrize(
    ("events", "states", "position"),
    [
        ([*CHANGED, ("watched", 1, 5)], [0, 5], 1),
        # An answer comes before its event, or behind a later one.
        ([("watched", 0, 0), ("answered", 1, 5), ("watched", 1, 5)], [0, 5], 1),
        (
            [("watched", 0, 0), ("watched", 1, 5), ("watched", 2, 6), ("answered", 1, 5)],
            [0, 5, 6],
            2,
        ),
        # Back, and on from there: what was undone is gone.
        ([*WENT_BACK, ("watched", 2, 0)], [0, 5], 0),
        ([*WENT_BACK, ("watched", 2, 0), ("watched", 3, 7)], [0, 7], 1),
        # Somebody else was first while an undo was asked for.
        ([*WENT_BACK, ("watched", 2, 9)], [0, 5, 9], 2),
        # An adapter was replaced: the same mix, of another digest, is no step.
        ([*CHANGED, ("watched", 2, 5), ("undo", 0, 0), ("watched", 3, 0)], [0, 5], 0),
        # A server without a past.
        ([("watched", 7, 5), ("watched", 0, 0)], [5, 0], 1),
    ],
)
def test_history_is_what_was_watched(
    modules: Modules, events: list[tuple[str, int, int]], states: list[int], position: int
) -> None:
    assert modules.call("history", HISTORY, events) == [states, position]


def test_a_long_history_forgets_its_beginning(modules: Modules) -> None:
    events = [("watched", generation, generation) for generation in range(300)]
    states, position = modules.call("history", HISTORY, events)
    assert (states[-1], position) == (299, len(states) - 1)
    assert len(states) == 200

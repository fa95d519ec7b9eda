import pytest
from hypothesis import given
from hypothesis import strategies as st

from superpose_client.differences import differing_words, word_spans

WORDS = st.lists(st.sampled_from("abc"), max_size=12)


@pytest.mark.parametrize(
    ("texts", "differing"),
    [
        (["a b c", "a b c"], [set(), set()]),
        (["a b c", "a x b c"], [set(), {1}]),
        (["a b c", "a y c"], [{1}, {1}]),
        (["a b c", ""], [{0, 1, 2}, set()]),
        (["a b c", "a b d", "a b c"], [{2}, {2}, {2}]),
        (["a b", "a b", "x a b"], [set(), set(), {0}]),
    ],
)
def test_a_word_differs_unless_all_have_it(texts: list[str], differing: list[set[int]]) -> None:
    assert differing_words([text.split() for text in texts]) == differing


@given(WORDS, WORDS)
def test_without_the_words_that_differ_two_texts_are_one(one: list[str], other: list[str]) -> None:
    left, right = (
        [word for i, word in enumerate(text) if i not in differing]
        for text, differing in zip((one, other), differing_words([one, other]), strict=True)
    )
    assert left == right
    # And no word is marked in vain: the longest run that both have is in it.
    runs = [one[i:j] for i in range(len(one)) for j in range(i + 1, len(one) + 1)]
    common = [len(run) for run in runs if "".join(run) in "".join(other)]
    assert len(left) >= max(common, default=0)


def test_words_stand_between_blanks() -> None:
    text = " one,\n\ttwo  三 "
    assert [text[begin:end] for begin, end in word_spans(text)] == ["one,", "two", "三"]

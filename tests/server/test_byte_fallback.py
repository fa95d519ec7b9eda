"""Texts of tokenizers that spell characters in byte tokens, as SentencePiece makes them."""

from __future__ import annotations

import codecs

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.makers import byte_fallback_tokenizer
from tests.server.test_tokenizer import push_all

from superpose_server.engine.tokenizer import Detokenizer, Tokenizer

FFFD = "\N{REPLACEMENT CHARACTER}"
BYTES = 3  # the id of <0x00>
LONG = "\N{THAI CHARACTER KO KAI}\N{HANGUL SYLLABLE GA}日本語👍🏽é ab"


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    folder = tmp_path_factory.mktemp("byte-fallback")
    byte_fallback_tokenizer().save_pretrained(folder)
    return Tokenizer(folder)


def stray(error: UnicodeError) -> tuple[str, int]:
    assert isinstance(error, UnicodeDecodeError)
    return FFFD * (error.end - error.start), error.end


codecs.register_error("each-stray-byte", stray)


def reference(tokenizer: Tokenizer, ids: list[int]) -> str:
    """Python's reading of the tokens' bytes, a stray one as U+FFFD, which is SentencePiece's."""
    data = b""
    for token in tokenizer.inner.convert_ids_to_tokens(ids):
        if token.startswith("<0x"):
            data += bytes([int(token[1:-1], 16)])
        elif token not in ("<unk>", "<s>", "</s>"):
            data += token.replace("\u2581", " ").encode()
    return data.decode("utf-8", "each-stray-byte").removeprefix(" ")


def ids_of(text: bytes) -> list[int]:
    return [BYTES + byte for byte in text]


def test_an_answer_goes_on_in_a_script_outside_the_vocabulary(tokenizer: Tokenizer) -> None:
    # More bytes than decoding looks back at, so that it starts within a character.
    for known in range(1, 12):
        prompt = tokenizer.inner.encode("日本語ไทย"[:known] * 2)
        answer = ids_of("本語です".encode())
        assert push_all(Detokenizer(tokenizer, (), prompt), answer) == [
            *("", "", "本", "", "", "語", "", "", "で", "", "", "す", "")
        ]


@given(text=st.text(st.sampled_from(LONG), min_size=1, max_size=30), data=st.data())
def test_what_follows_a_prompt_is_what_transformers_says_it_adds(
    tokenizer: Tokenizer, text: str, data: st.DataObject
) -> None:
    inner = tokenizer.inner
    cut = data.draw(st.integers(0, len(text)))
    ids = inner(text, add_special_tokens=False)["input_ids"]
    assert inner.decode(ids) == text
    # The tokens of the text's beginning, if it ends where a token ends.
    prompt: list[int] = next(
        (ids[:n] for n in range(len(ids) + 1) if inner.decode(ids[:n]) == text[:cut]), []
    )
    pieces = push_all(Detokenizer(tokenizer, (), prompt), ids[len(prompt) :])
    assert "".join(pieces) == inner.decode(ids)[len(inner.decode(prompt)) :]
    assert pieces[-1] == ""
    assert not any(FFFD in piece for piece in pieces)


TOKENS = st.lists(
    st.one_of(
        st.integers(0, 266).map(lambda token: [token]),
        st.sampled_from(LONG).map(lambda character: ids_of(character.encode())),
        # What may or may not begin or end a character.
        st.sampled_from([0xC3, 0xE6, 0xF0, 0x80, 0x9F, 0xA9, 0xBF]).map(lambda b: [BYTES + b]),
    ),
    max_size=20,
).map(lambda groups: [token for group in groups for token in group])


@given(ids=TOKENS)
def test_any_tokens_give_every_whole_character_and_a_mark_for_each_stray_byte(
    tokenizer: Tokenizer, ids: list[int]
) -> None:
    expected = reference(tokenizer, ids)
    assert tokenizer.decode(ids) == expected
    assert "".join(push_all(Detokenizer(tokenizer, ()), ids)) == expected
    # transformers' own text has every character of a run of bytes lost if one is stray.
    if FFFD not in tokenizer.inner.decode(ids):
        assert expected == tokenizer.inner.decode(ids, skip_special_tokens=True)


@given(prompt=TOKENS, ids=TOKENS)
def test_no_mark_is_told_that_the_whole_text_does_not_hold(
    tokenizer: Tokenizer, prompt: list[int], ids: list[int]
) -> None:
    told = "".join(push_all(Detokenizer(tokenizer, (), prompt), ids))
    whole, before = reference(tokenizer, prompt + ids), reference(tokenizer, prompt)
    assert whole.endswith(told)
    assert told.count(FFFD) <= whole.count(FFFD)
    # Nothing is told twice or kept back: what is left is the prompt's, but for a character that
    # the prompt began.
    assert before.startswith(whole[: len(whole) - len(told)])
    assert len(before) - (len(whole) - len(told)) <= 3


def test_a_character_that_the_prompt_began_is_the_answers(tokenizer: Tokenizer) -> None:
    first, *rest = ids_of("日".encode())
    prompt = [*tokenizer.inner.encode("語"), first]
    assert push_all(Detokenizer(tokenizer, (), prompt), [*rest, *ids_of(b"a")]) == [
        *("", "日", "a", "")
    ]


def test_a_text_cut_within_a_character_keeps_the_characters_before(tokenizer: Tokenizer) -> None:
    ids = ids_of("日本".encode())[:-1]
    assert push_all(Detokenizer(tokenizer, (), ids_of("語".encode())), ids) == [
        *("", "", "日", "", "", FFFD * 2)
    ]


def test_stray_bytes_are_told_although_more_of_them_follow(tokenizer: Tokenizer) -> None:
    pieces = push_all(Detokenizer(tokenizer, ()), ids_of(b"\x80" * 40))
    assert pieces == ["", "", "", *[FFFD] * 37, FFFD * 3]

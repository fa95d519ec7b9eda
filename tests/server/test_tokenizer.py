from __future__ import annotations

import json
from pathlib import Path

import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st
from tests.makers import EOS_ID
from tests.server.helpers import Client, bound
from tokenizers.pre_tokenizers import ByteLevel
from transformers import PreTrainedTokenizerFast

from superpose_server.engine.logprobs import Logprobs
from superpose_server.engine.sampling import SamplingParams
from superpose_server.engine.sequence import FinishReason, Sequence
from superpose_server.engine.tokenizer import Detokenizer, Tokenizer
from superpose_server.errors import InvalidArgument

WORDS = "naïve 👩🏽‍🚀 日本語 done"


@pytest.fixture(scope="module")
def tokenizer(bases: dict[str, Path]) -> Tokenizer:
    return Tokenizer(bases["gpt2"])


def push_all(detokenizer: Detokenizer, ids: list[int]) -> list[str]:
    """The pieces, the last one from `finish`; nothing is pushed after a stop."""
    pieces = []
    for token in ids:
        pieces.append(detokenizer.push(token))
        if detokenizer.stopped:
            break
    return [*pieces, detokenizer.finish()]


TOKENS = st.lists(
    # Whole characters, so that some are complete, between bytes that are often not.
    st.one_of(
        st.integers(0, EOS_ID).map(lambda token: [token]),
        st.sampled_from(["é", "日", "👍", "a", " "]).map(lambda text: list(text.encode())),
    ),
    max_size=12,
).map(lambda groups: [token for group in groups for token in group])


@given(ids=TOKENS)
def test_pieces_join_to_the_text_of_all_tokens(tokenizer: Tokenizer, ids: list[int]) -> None:
    pieces = push_all(Detokenizer(tokenizer, ()), ids)
    assert "".join(pieces) == tokenizer.decode(ids)


@given(text=st.text(max_size=12))
def test_a_character_is_never_split(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.inner.encode(text)
    pieces = push_all(Detokenizer(tokenizer, ()), ids)
    assert "".join(pieces) == text
    if "\N{REPLACEMENT CHARACTER}" not in text:
        assert all("\N{REPLACEMENT CHARACTER}" not in piece for piece in pieces)


def test_a_character_comes_with_its_last_byte(tokenizer: Tokenizer) -> None:
    ids = tokenizer.inner.encode("a👍b")
    assert len(ids) == 6  # one token a byte
    assert push_all(Detokenizer(tokenizer, ()), ids) == ["a", "", "", "", "👍", "b", ""]


def test_half_a_character_at_the_end_is_told_by_finish(tokenizer: Tokenizer) -> None:
    ids = tokenizer.inner.encode("a日")[:-1]
    pieces = push_all(Detokenizer(tokenizer, ()), ids)
    assert pieces == ["a", "", "", "\N{REPLACEMENT CHARACTER}"]


@pytest.mark.parametrize(
    ("text", "stop", "expected"),
    [
        ("one two three", ("two",), "one "),
        ("one two three", ("e t", "two"), "on"),
        ("one two three", ("two", "ne"), "o"),
        ("aab", ("ab",), "a"),
        ("aaab", ("aab",), "a"),
        ("abab!", ("abb", "ab!"), "ab"),
        ("xyz", ("yzz", "z"), "xy"),
        ("xyz", ("xyzq",), "xyz"),
        ("end", ("end",), ""),
        ("日本語", ("本",), "日"),
        ("a👍b", ("👍",), "a"),
        ("\n\nUser:", ("\n\nUser:", "\n\nBot:"), ""),
    ],
)
def test_text_ends_before_a_stop_string(
    tokenizer: Tokenizer, text: str, stop: tuple[str, ...], expected: str
) -> None:
    detokenizer = Detokenizer(tokenizer, stop)
    assert "".join(push_all(detokenizer, tokenizer.inner.encode(text))) == expected
    assert detokenizer.stopped == any(s in text for s in stop)


@given(
    text=st.text(alphabet="ab", max_size=16),
    stop=st.lists(st.text(alphabet="ab", min_size=1, max_size=4), max_size=3),
)
def test_no_piece_ever_holds_a_part_of_a_stop_string_that_comes(
    tokenizer: Tokenizer, text: str, stop: list[str]
) -> None:
    detokenizer = Detokenizer(tokenizer, stop)
    found = "".join(push_all(detokenizer, tokenizer.inner.encode(text)))
    # The first prefix of the text that holds a stop string ends it, at that string's begin.
    prefixes = (text[:end] for end in range(len(text) + 1))
    whole = next((p for p in prefixes if any(s in p for s in stop)), None)
    if whole is None:
        assert found == text
        assert not detokenizer.stopped
    else:
        assert found == whole[: min(whole.find(s) for s in stop if s in whole)]
        assert detokenizer.stopped


def test_text_that_may_become_a_stop_string_is_held_back(tokenizer: Tokenizer) -> None:
    pieces = push_all(Detokenizer(tokenizer, ("abc",)), tokenizer.inner.encode("xababd"))
    assert pieces == ["x", "", "", "ab", "", "abd", ""]


# Rows: stops, lengths and minimum lengths together.


def run(tokenizer: Tokenizer, ids: list[int], **values: object) -> Client:
    """What a client is told of a row for which a model chose `ids`."""
    client = Client()
    params = SamplingParams(**({"max_new_tokens": len(ids)} | values))  # type: ignore[arg-type]
    row = Sequence([1], bound(), params, client, tokenizer)
    for token in ids:
        client(row.append(token, Logprobs()))
        if client.ended:
            break
    return client


def test_a_stop_string_ends_a_row(tokenizer: Tokenizer) -> None:
    client = run(tokenizer, tokenizer.inner.encode("one. two"), stop=(". ",))
    assert (client.text, client.reason) == ("one", FinishReason.STOP)
    assert len(client.tokens) == 5  # the tokens of the stop string are told


def test_a_stop_string_in_the_last_token_is_a_stop(tokenizer: Tokenizer) -> None:
    client = run(tokenizer, tokenizer.inner.encode("one!"), stop=("!",))
    assert (client.text, client.reason) == ("one", FinishReason.STOP)


def test_held_text_comes_at_the_end(tokenizer: Tokenizer) -> None:
    client = run(tokenizer, tokenizer.inner.encode("one"), stop=("e!",))
    assert (client.text, client.reason) == ("one", FinishReason.LENGTH)


def test_the_end_of_text_is_no_text(tokenizer: Tokenizer) -> None:
    client = run(tokenizer, [*tokenizer.inner.encode("日")[:2], EOS_ID, 65])
    assert client.text == "\N{REPLACEMENT CHARACTER}"
    assert client.reason is FinishReason.STOP
    assert client.tokens[-1] == EOS_ID


def test_stop_strings_before_min_new_tokens_are_text(tokenizer: Tokenizer) -> None:
    ids = tokenizer.inner.encode("a.b.c.d")
    client = run(tokenizer, ids, stop=(".",), min_new_tokens=5)
    assert (client.text, client.reason) == ("a.b.c", FinishReason.STOP)
    assert len(client.tokens) == 6
    assert run(tokenizer, ids, stop=(".",), min_new_tokens=4).text == "a.b"


@pytest.mark.parametrize(
    ("least", "text", "tokens"),
    # "stop" is tokens 3 to 6 of "a stop b stop".
    [(0, "a ", 6), (2, "a ", 6), (3, "a ", 6), (5, "a ", 6), (6, "a ", 6), (7, "a stop b ", 13)],
)
def test_a_stop_string_counts_from_the_token_of_its_last_character(
    tokenizer: Tokenizer, least: int, text: str, tokens: int
) -> None:
    client = run(
        tokenizer, tokenizer.inner.encode("a stop b stop"), stop=("stop",), min_new_tokens=least
    )
    assert (client.text, client.reason) == (text, FinishReason.STOP)
    assert len(client.tokens) == tokens


@given(
    text=st.text(alphabet="ab", min_size=1, max_size=12),
    stop=st.lists(st.text(alphabet="ab", min_size=1, max_size=4), max_size=3),
    least=st.integers(0, 12),
)
def test_text_ends_at_the_first_token_from_the_least_on_that_ends_a_stop_string(
    tokenizer: Tokenizer, text: str, stop: list[str], least: int
) -> None:
    least = min(least, len(text))
    client = run(tokenizer, tokenizer.inner.encode(text), stop=tuple(stop), min_new_tokens=least)
    # One token a character, so a token ends what the text so far ends with.
    for count in range(max(least, 1), len(text) + 1):
        ending = [s for s in stop if text[:count].endswith(s)]
        if ending:
            assert client.text == text[: count - max(map(len, ending))]
            assert (client.reason, len(client.tokens)) == (FinishReason.STOP, count)
            return
    assert (client.text, client.reason) == (text, FinishReason.LENGTH)


def test_a_shorter_stop_string_that_was_text_does_not_count_once_a_longer_one_might_come(
    tokenizer: Tokenizer,
) -> None:
    client = run(tokenizer, tokenizer.inner.encode("abx"), stop=("b", "abc"), min_new_tokens=3)
    assert (client.text, client.reason) == ("abx", FinishReason.LENGTH)


def test_a_row_aborted_before_its_least_length_loses_no_text(tokenizer: Tokenizer) -> None:
    client = Client()
    params = SamplingParams(stop=("\N{REPLACEMENT CHARACTER}",), min_new_tokens=9)
    row = Sequence([1], bound(), params, client, tokenizer)
    for token in tokenizer.inner.encode("x日")[:-1]:
        client(row.append(token, Logprobs()))
    client(row.abort())
    assert client.text == "x\N{REPLACEMENT CHARACTER}"


# Stop strings that spell special tokens.


@pytest.fixture(scope="module")
def chatty(bases: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """With the tokens of a chat: <|end|>, which is special, and <|tool|>, which is text."""
    inner = Tokenizer(bases["gpt2"]).inner
    inner.add_special_tokens({"additional_special_tokens": ["<|end|>"]})
    inner.add_tokens(["<|tool|>"])
    folder = tmp_path_factory.mktemp("chatty")
    inner.save_pretrained(folder)
    return Tokenizer(folder)


def test_a_stop_string_that_is_a_special_token_ends_a_row_at_the_token(chatty: Tokenizer) -> None:
    end = chatty.special["<|end|>"]
    ids = [*chatty.inner.encode("one"), end, *chatty.inner.encode("two")]
    client = run(chatty, ids, stop=("<|end|>",), ignore_eos=True)
    assert (client.text, client.reason) == ("one", FinishReason.STOP)
    assert client.tokens[-1] == end
    assert run(chatty, ids).text == "onetwo"
    # Spelled in other tokens it is text, and ends a row as any other stop string.
    spelled = [*chatty.inner.encode("one<|en"), *chatty.inner.encode("d|>two")]
    assert run(chatty, spelled).text == "one<|end|>two"
    assert run(chatty, spelled, stop=("<|end|>",)).text == "one"
    # It is not chosen before the least length.
    params = SamplingParams(stop=("<|end|>",), min_new_tokens=1)
    assert Sequence([1], bound(), params, Client(), chatty).forbidden == {EOS_ID, end}


def test_a_stop_string_that_is_an_added_token_with_text_is_found_in_the_text(
    chatty: Tokenizer,
) -> None:
    ids = chatty.inner.encode("one<|tool|>two")
    assert len(ids) == 7
    client = run(chatty, ids, stop=("e<|tool",))
    assert (client.text, client.reason) == ("on", FinishReason.STOP)


def test_an_aborted_row_gets_the_text_that_was_held(tokenizer: Tokenizer) -> None:
    client = Client()
    row = Sequence([1], bound(), SamplingParams(stop=("abc",)), client, tokenizer)
    for token in tokenizer.inner.encode("xab"):
        client(row.append(token, Logprobs()))
    assert client.text == "x"
    client(row.abort())
    assert (client.text, client.reason) == ("xab", FinishReason.ABORTED)


def test_eos_is_a_stop_unless_it_is_ignored(tokenizer: Tokenizer) -> None:
    def stops(**values: object) -> frozenset[int]:
        params = SamplingParams(**values)  # type: ignore[arg-type]
        return Sequence([1], bound(), params, Client(), tokenizer).stop_token_ids

    assert stops() == {EOS_ID}
    assert stops(ignore_eos=True) == frozenset()
    assert stops(ignore_eos=True, stop_token_ids=(5, EOS_ID)) == {5, EOS_ID}


def test_a_base_without_chat_template_says_so(tokenizer: Tokenizer) -> None:
    with pytest.raises(InvalidArgument, match="no chat template") as caught:
        tokenizer.encode_chat([("user", "hello")])
    assert caught.value.reason == "NO_CHAT_TEMPLATE"


def test_messages_are_put_into_the_chat_template(bases: dict[str, Path]) -> None:
    tokenizer = Tokenizer(bases["gpt2"])
    tokenizer.inner.chat_template = (
        "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
        "{% if add_generation_prompt %}bot:{% endif %}"
    )
    ids = tokenizer.encode_chat([("user", "hi"), ("bot", "yes"), ("user", "so")])
    assert tokenizer.decode(ids) == "user: hi\nbot: yes\nuser: so\nbot:"


@pytest.mark.parametrize("role", ["user", "<|end|>"])
@pytest.mark.parametrize("content", ["a<|end|>", "<|tool|>b", "<|endoftext|>", "<|<|end|>end|>"])
def test_what_a_message_spells_stays_text_and_what_the_template_writes_is_a_token(
    chatty: Tokenizer, role: str, content: str
) -> None:
    chatty.inner.chat_template = (
        "{% for m in messages %}{{ m.role }}: {{ m.content }}<|end|>{% endfor %}<|tool|>"
    )
    # One token a byte, whatever the text spells.
    letters = sorted(ByteLevel.alphabet())
    spelled = [letters.index(letter) for letter in f"{role}:\u0120{content}"]
    end, tool = chatty.special["<|end|>"], chatty.inner.get_added_vocab()["<|tool|>"]
    assert chatty.encode_chat([(role, content)]) == [*spelled, end, tool]
    # A message without such tokens is what it was.
    plain = chatty.encode_chat([("user", "hi, <| you |>")])
    turns = [{"role": "user", "content": "hi, <| you |>"}]
    assert plain == chatty.inner.apply_chat_template(turns, return_dict=False)


def test_a_template_that_refuses_is_an_invalid_argument(bases: dict[str, Path]) -> None:
    tokenizer = Tokenizer(bases["gpt2"])
    tokenizer.inner.chat_template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(InvalidArgument, match="roles must alternate") as caught:
        tokenizer.encode_chat([("user", "hi")])
    assert caught.value.reason == "BAD_CHAT"


def test_text_goes_on_from_the_prompt_where_words_carry_their_space(tmp_path: Path) -> None:
    # As SentencePiece does it: a word at the very start of a text has no space before it.
    words = {"<s>": 0, "\u2581two": 1, "\u2581and": 2, "\u2581three": 3}
    inner = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="<s>"))
    inner.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace()
    inner.decoder = tokenizers.decoders.Metaspace()
    PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<s>").save_pretrained(tmp_path)
    tokenizer = Tokenizer(tmp_path)
    assert push_all(Detokenizer(tokenizer, (), prompt=[1]), [2, 3]) == [" and", " three", ""]
    assert push_all(Detokenizer(tokenizer, ()), [2, 3]) == ["and", " three", ""]


@given(prompt=TOKENS, ids=TOKENS)
def test_pieces_are_what_the_tokens_add_to_the_prompt(
    tokenizer: Tokenizer, prompt: list[int], ids: list[int]
) -> None:
    pieces = push_all(Detokenizer(tokenizer, (), prompt), ids)
    before, whole = tokenizer.decode(prompt), tokenizer.decode(prompt + ids)
    # A character that the prompt began is the answer's, once it is whole.
    kept = max(n for n in range(len(before) + 1) if whole.startswith(before[:n]))
    assert "".join(pieces) == whole[kept:]


def test_a_character_that_the_prompt_began_is_the_answers(tokenizer: Tokenizer) -> None:
    first, *rest = tokenizer.inner.encode("日")
    prompt = [*tokenizer.inner.encode("語"), first]
    assert push_all(Detokenizer(tokenizer, (), prompt), [*rest, 65]) == ["", "日", "b", ""]
    assert push_all(Detokenizer(tokenizer, ("日",), prompt), [*rest, 65]) == ["", "", ""]


@given(text=st.text(max_size=80))
def test_a_text_is_the_same_behind_a_prompt_of_any_kind(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.inner.encode(text)
    for prompt in ([], [EOS_ID] * 20, tokenizer.inner.encode(WORDS)):
        assert "".join(push_all(Detokenizer(tokenizer, (), prompt), ids)) == text


def test_a_word_in_pieces_is_told_without_its_joints(tmp_path: Path) -> None:
    (tmp_path / "vocab.json").write_text(json.dumps({"<unk>": 0, "hel@@": 1, "lo": 2, "he": 3}))
    (tmp_path / "merges.txt").write_text("#version: 0.2\nh e\n")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "ctrl"}))
    tokenizer = Tokenizer(tmp_path)
    ids = [3, 1, 2, 1, 1]
    assert tokenizer.decode(ids) == "he hello helhel@@"
    assert push_all(Detokenizer(tokenizer, ()), ids) == ["he", " hel", "lo", " hel", "hel", "@@"]

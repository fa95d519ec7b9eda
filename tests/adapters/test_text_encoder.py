from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from tests.makers import (
    EOS,
    EOS_ID,
    VOCABULARY,
    tiny_gpt2,
    tiny_llama,
    tiny_tokenizer,
    tokenizer_adding,
)
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    BertTokenizer,
    CTRLTokenizer,
    GemmaTokenizer,
    LlamaTokenizer,
    PreTrainedTokenizerFast,
    T5Tokenizer,
)

from superpose_adapters.text_encoder import TextEncoder, TokenRefused, logits_of, vocabulary_of

BOS_ID = VOCABULARY  # of the makers' tokenizers that add one
TEXT = "how are you"


@pytest.fixture(scope="module")
def encoder() -> TextEncoder:
    return TextEncoder(tiny_tokenizer(), VOCABULARY)


def metaspace(*words: str) -> dict[str, int]:
    """Words for a SentencePiece tokenizer, each of them and the letters of all."""
    letters = sorted({letter for word in words for letter in word})
    return {token: 6 + index for index, token in enumerate(["\u2581", *letters])}


LETTERS = {"<pad>": 0, "<eos>": 1, "<bos>": 2, "<unk>": 3, "<s>": 4, "</s>": 5} | metaspace(TEXT)
UNIGRAM = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("\u2581", -2.0)] + [
    (letter, -2.0) for letter in sorted(set(TEXT) - {" "})
]
BERT = {"[PAD]": 0, "[UNK]": 1, "[CLS]": 2, "[SEP]": 3, "[MASK]": 4, "how": 5, "are": 6, "you": 7}

TOKENIZERS: dict[str, Callable[[], Any]] = {
    "llama": lambda: LlamaTokenizer(vocab=dict(LETTERS), merges=[], add_bos_token=True),
    "llama with an end": lambda: LlamaTokenizer(
        vocab=dict(LETTERS), merges=[], add_bos_token=True, add_eos_token=True
    ),
    "gemma": lambda: GemmaTokenizer(vocab=dict(LETTERS), merges=[], add_bos_token=True),
    "t5": lambda: T5Tokenizer(vocab=list(UNIGRAM), extra_ids=0),
    "bert": lambda: BertTokenizer(vocab=dict(BERT)),
    "gpt2": tiny_tokenizer,
    "bos": lambda: tokenizer_adding("<s>"),
    "eos": lambda: tokenizer_adding(after=EOS),
    "both": lambda: tokenizer_adding("<s>", EOS),
}


# What transformers does, of each kind of tokenizer.


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_a_scored_text_is_what_transformers_makes_of_it(kind: str) -> None:
    tokenizer = TOKENIZERS[kind]()
    found = TextEncoder(tokenizer, len(tokenizer)).text(TEXT, 100)
    assert found.ids == tuple(tokenizer(TEXT)["input_ids"])
    assert found.answer_start is None


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_a_prompt_is_what_transformers_makes_of_it_but_for_an_end(kind: str) -> None:
    tokenizer = TOKENIZERS[kind]()
    ends = {"t5": "</s>", "bert": "[SEP]", "eos": EOS, "both": EOS, "llama with an end": "</s>"}
    end = tokenizer.convert_tokens_to_ids([ends[kind]]) if kind in ends else []
    found = TextEncoder(tokenizer, len(tokenizer)).prompt(TEXT)
    assert [*found, *end] == tokenizer(TEXT)["input_ids"]
    assert found[-1] not in end


@pytest.mark.parametrize(
    ("kind", "before"),
    [("llama", "<s>"), ("gemma", "<bos>"), ("t5", ""), ("bert", "[CLS]"), ("bos", "<s>")],
)
def test_what_stands_before_a_text(kind: str, before: str) -> None:
    tokenizer = TOKENIZERS[kind]()
    assert TextEncoder(tokenizer, len(tokenizer)).tokens_before == ([before] if before else [])
    plain = TextEncoder(tokenizer, len(tokenizer), special_tokens=False)
    assert plain.tokens_before == []
    assert plain.text(TEXT, 100).ids == tuple(
        tokenizer(TEXT, add_special_tokens=False)["input_ids"]
    )


@pytest.mark.parametrize("kind", ["llama", "llama with an end", "gemma", "bos", "both"])
def test_a_text_that_spells_its_first_token_does_not_get_it_twice(kind: str) -> None:
    tokenizer = TOKENIZERS[kind]()
    encoder = TextEncoder(tokenizer, len(tokenizer))
    spelled = tokenizer.bos_token + TEXT
    assert encoder.prompt(spelled) == tokenizer(spelled, add_special_tokens=False)["input_ids"]
    row = encoder.row("are", "you", 100, tokenizer.bos_token + "{q} {a}")
    assert row.ids.count(tokenizer.bos_token_id) == 1
    assert row.ids[0] == tokenizer.bos_token_id


@pytest.mark.parametrize("kind", sorted(TOKENIZERS.keys() - {"t5", "bert"}))
def test_a_row_begins_as_its_prompt_is_served_and_ends_in_one_end_of_text(kind: str) -> None:
    tokenizer = TOKENIZERS[kind]()
    encoder = TextEncoder(tokenizer, len(tokenizer))
    row = encoder.row("how are", "you", 100, "{q} {a}")
    assert row.answer_start is not None
    prompt = encoder.prompt("how are")
    assert list(row.ids[: row.answer_start]) == prompt
    plain = tokenizer("how are you", add_special_tokens=False)["input_ids"]
    assert list(row.ids) == [*prompt[: len(encoder.before)], *plain, tokenizer.eos_token_id]


# Rows and cuts.


def test_a_text_without_special_tokens_is_encoded_as_it_is(encoder: TextEncoder) -> None:
    tokenizer = tiny_tokenizer()
    encoded = encoder.text("Hi there\n", 100)
    assert tokenizer.decode(encoded.ids) == "Hi there\n"
    assert len(encoded.ids) == 9
    assert encoder.text("", 100).ids == ()


def test_a_row_is_the_template_and_the_end_of_text(encoder: TextEncoder) -> None:
    tokenizer = tiny_tokenizer()
    encoded = encoder.row("How?", "So.", 100)
    assert tokenizer.decode(encoded.ids[:-1]) == "Question: How?\nAnswer: So."
    assert encoded.ids[-1] == EOS_ID
    assert encoded.answer_start is not None
    assert tokenizer.decode(encoded.ids[encoded.answer_start : -1]) == " So."


def test_the_answer_starts_at_the_token_that_reaches_into_it() -> None:
    # One token ": S" straddles the border, which encoding the prompt alone would not show.
    vocabulary = {c: i for i, c in enumerate("Question: How?\nAnswer: So.")}
    vocabulary = {c: i for i, c in enumerate(sorted(vocabulary))}
    vocabulary |= {" S": len(vocabulary), ": S": len(vocabulary) + 1, "<e>": len(vocabulary) + 2}
    bpe = Tokenizer(models.BPE(vocab=vocabulary, merges=[(" ", "S"), (":", " S")]))
    bpe.pre_tokenizer = pre_tokenizers.Split("\n", "isolated")
    straddling = PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="<e>")
    encoded = TextEncoder(straddling, len(straddling)).row("How?", "So.", 100)
    assert encoded.answer_start is not None
    assert encoded.ids[encoded.answer_start] == vocabulary[": S"]
    assert len(encoded.ids) - encoded.answer_start == 4  # ": S", "o", ".", end of text


@pytest.mark.parametrize("length", [1, 2, 20, 28, 29])
@pytest.mark.parametrize("before", [0, 1])
def test_truncation_is_on_the_right(length: int, before: int) -> None:
    tokenizer = tokenizer_adding("<s>") if before else tiny_tokenizer()
    encoder = TextEncoder(tokenizer, VOCABULARY + before)
    whole = encoder.row("How?", "So.", 100)
    cut = encoder.row("How?", "So.", length)
    assert cut.ids == whole.ids[:length]
    assert cut.answer_start == whole.answer_start == 22 + before
    assert cut.first_scored("answer") == min(22 + before, len(cut.ids))
    assert cut.first_scored("all") == 1
    assert encoder.text("abcdef", 4 + before).ids == encoder.text("abcd", 9).ids


# Tokens that the base has no embedding for.


@pytest.fixture(scope="module")
def padded() -> TextEncoder:
    """Of a tokenizer to which `[PAD]` was added, and a base that was not resized for it."""
    tokenizer = tiny_tokenizer()
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    return TextEncoder(tokenizer, VOCABULARY)


def test_a_token_without_an_embedding_is_refused_by_name(padded: TextEncoder) -> None:
    with pytest.raises(TokenRefused, match=r"^holds token 257 \('\[PAD\]'\), and the base has"):
        padded.prompt("x [PAD]")
    with pytest.raises(TokenRefused, match="PAD"):
        padded.text("x [PAD]", 3)
    with pytest.raises(TokenRefused, match="PAD"):
        padded.row("q", "[PAD]", 100)
    with pytest.raises(TokenRefused, match=r"^holds token 9999, and"):
        padded.check([0, 256, 9999])
    padded.check(range(VOCABULARY))


def test_what_is_cut_off_may_hold_anything(padded: TextEncoder) -> None:
    assert padded.text("x [PAD]", 2).ids == padded.text("x ", 9).ids
    assert len(padded.row("q", "a [PAD]", 20).ids) == 20


def test_an_end_of_text_without_an_embedding_is_refused(padded: TextEncoder) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.add_special_tokens({"eos_token": "</s>"})
    encoder = TextEncoder(tokenizer, VOCABULARY)
    assert encoder.prompt("x") == padded.prompt("x")
    # Although it is cut off: a row that is not may come.
    with pytest.raises(ValueError, match=r"the end of every row holds token 257 \('</s>'\)"):
        encoder.row("q", "a", 5)


def test_a_first_token_without_an_embedding_is_refused_at_once() -> None:
    with pytest.raises(ValueError, match=r"adds to every text holds token 257 \('<s>'\)"):
        TextEncoder(tokenizer_adding("<s>"), VOCABULARY)


def test_the_vocabulary_is_that_of_the_embedding() -> None:
    for model in (tiny_gpt2(vocab_size=77), tiny_llama(vocab_size=77)):
        assert vocabulary_of(model) == 77
        model.resize_token_embeddings(81)
        assert vocabulary_of(model) == 81


def test_refusals(encoder: TextEncoder) -> None:
    with pytest.raises(ValueError, match="max_length must be at least 1, got 0"):
        encoder.text("a", 0)
    endless = tiny_tokenizer()
    endless.eos_token = None
    with pytest.raises(ValueError, match="no end-of-text"):
        TextEncoder(endless, VOCABULARY).row("q", "a", 9)


def test_a_tokenizer_that_tells_no_characters_encodes_texts_but_no_rows(tmp_path: Any) -> None:
    (tmp_path / "vocab.json").write_text('{"<unk>": 0, "a": 1, "a</w>": 2}')
    (tmp_path / "merges.txt").write_text("#version: 0.2\n")
    slow = CTRLTokenizer(tmp_path / "vocab.json", tmp_path / "merges.txt", eos_token="<unk>")
    encoder = TextEncoder(slow, len(slow))
    assert encoder.prompt("a a") == slow("a a")["input_ids"]
    with pytest.raises(ValueError, match=r"CTRLTokenizer.*use a base with a tokenizer\.json"):
        encoder.row("a", "a", 9)


def test_ids_that_are_to_be_chosen_are_checked_against_the_logits() -> None:
    encoder = TextEncoder(tiny_tokenizer(), VOCABULARY, logits=VOCABULARY - 1)
    encoder.check([VOCABULARY - 1])
    encoder.check_choices(range(VOCABULARY - 1))
    message = rf"holds token {VOCABULARY - 1}.* and the base has logits for {VOCABULARY - 1} tokens"
    with pytest.raises(TokenRefused, match=message):
        encoder.check_choices([0, VOCABULARY - 1])


@pytest.mark.parametrize("make", [tiny_gpt2, tiny_llama])
def test_a_base_has_as_many_logits_as_its_head_gives(make: Callable[[], Any]) -> None:
    model = make()
    assert logits_of(model) == model(torch.tensor([[1]])).logits.shape[-1]

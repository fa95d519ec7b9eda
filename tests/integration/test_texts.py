"""How texts become token ids, on a server whose tokenizer adds BOS and knows one token too many."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence

import pytest
import torch
from tests.integration.harness import LoopThread, Served, held, start
from tests.makers import EOS_ID, VOCABULARY, save_base, tiny_llama, tokenizer_adding
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from superpose_client import InvalidArgumentError

TEMPLATE = (
    "{{ bos_token }}{% if messages[0].role == 'odd' %}{{ pad_token }}{% endif %}"
    "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}bot:{% endif %}"
)


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    """With embeddings of the bytes, the end of text and BOS."""
    return tiny_llama(n_positions=512, vocab_size=VOCABULARY + 1)


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    """With BOS before every text, and `[PAD]`, which the model was not resized for."""
    tokenizer = tokenizer_adding("<s>")
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    tokenizer.chat_template = TEMPLATE
    return tokenizer


@pytest.fixture(scope="module")
def served(
    loop: LoopThread,
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Served]:
    folder = tmp_path_factory.mktemp("texts")
    server = start(loop, save_base(model, folder / "base", tokenizer), folder / "state")
    try:
        yield server
    finally:
        server.stop()


def logprobs(model: LlamaForCausalLM, ids: Sequence[int]) -> list[float]:
    """What transformers gives each id but the first."""
    with torch.inference_mode():
        logits = model(torch.tensor([ids])).logits[0, :-1]
    values = logits.log_softmax(-1).gather(1, torch.tensor(ids)[1:, None])[:, 0]
    return [float(value) for value in values]


# The convention.


def test_a_prompt_and_a_scored_text_begin_alike(
    served: Served, model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast
) -> None:
    ids = tokenizer("hello")["input_ids"]
    assert ids[0] == tokenizer.bos_token_id
    with torch.inference_mode():
        expected = model.generate(torch.tensor([ids]), max_new_tokens=6, do_sample=False)
    text, whole = (
        served.client.generate(prompt, max_new_tokens=6, temperature=0, ignore_eos=True)
        for prompt in ("hello", ids)
    )
    assert text.usage.prompt_tokens == len(ids)
    assert [*ids, *text.token_ids][: expected.shape[1]] == expected[0].tolist()
    assert whole.token_ids == text.token_ids
    (item,) = served.client.score(["hello"], logprobs=True).items
    assert item.logprobs == pytest.approx(logprobs(model, ids), abs=2e-4)


def test_a_row_begins_as_its_prompt_does(
    served: Served, model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast
) -> None:
    ids = [*tokenizer("Question: why\nAnswer: so")["input_ids"], EOS_ID]
    (item,) = served.client.score([("why", "so")], logprobs=True).items
    assert item.logprobs == pytest.approx(logprobs(model, ids), abs=2e-4)
    (item,) = served.client.score([("why", "so")], logprobs=True, scope="answer").items
    assert item.logprobs == pytest.approx(logprobs(model, ids)[-4:], abs=2e-4)


def test_token_ids_are_scored_as_they_are(served: Served, model: LlamaForCausalLM) -> None:
    (item,) = served.client.score([[7, 8, 9]], logprobs=True).items
    assert item.logprobs == pytest.approx(logprobs(model, [7, 8, 9]), abs=2e-4)
    assert served.client.generate([7], max_new_tokens=1).usage.prompt_tokens == 1


def test_a_chat_template_that_spells_bos_does_not_double_it(
    served: Served, tokenizer: PreTrainedTokenizerFast
) -> None:
    messages = [{"role": "user", "content": "hi"}]
    plain = tokenizer("user: hi\nbot:", add_special_tokens=False)["input_ids"]
    found = served.client.generate(messages, max_new_tokens=1)
    assert found.usage.prompt_tokens == 1 + len(plain)
    # Nor does the text of a conversation that somebody has put into the template himself.
    found = served.client.generate("<s>user: hi\nbot:", max_new_tokens=1)
    assert found.usage.prompt_tokens == 1 + len(plain)


# A token without an embedding.


@pytest.mark.parametrize(
    ("call", "field"),
    [
        (lambda s: s.client.generate("x [PAD]"), "prompt"),
        (lambda s: s.client.generate([{"role": "odd", "content": "x"}]), "chat"),
        (lambda s: s.client.generate([1, VOCABULARY + 1]), "token_ids"),
        (lambda s: s.client.generate("x", stop_token_ids=[258]), "options.stop_token_ids"),
        (lambda s: s.client.score(["ab", "x [PAD]"]), "texts[1]"),
        (lambda s: s.client.score([("q", "[PAD]")]), "texts[0]"),
        (lambda s: s.client.score([[1, VOCABULARY + 1]]), "texts[0]"),
    ],
)
def test_a_token_without_an_embedding_is_named(
    served: Served, call: Callable[[Served], object], field: str
) -> None:
    with pytest.raises(InvalidArgumentError, match=r"holds token 258 \('\[PAD\]'\)") as caught:
        call(served)
    assert caught.value.reason == "TOKEN_OUT_OF_RANGE"
    assert [violation.field for violation in caught.value.field_violations] == [field]


def test_it_fails_nobody_else(served: Served) -> None:
    alone = served.client.generate("hello", max_new_tokens=8, temperature=0)
    with held(served.recorder) as release:
        running = served.client.stream("hello", max_new_tokens=8, temperature=0)
        with pytest.raises(InvalidArgumentError):
            served.client.generate("x [PAD]")
        release.set()
        tokens = [token for chunk in running for token in chunk.token_ids]
    assert tokens == list(alone.token_ids)


def test_what_max_length_cuts_off_may_hold_it(served: Served) -> None:
    cut = served.client.score(["hello [PAD]"], max_length=6)
    assert cut.items == served.client.score(["hello"]).items


# Texts without a scored token.


@pytest.mark.parametrize("place", [0, 1, 256])
def test_a_text_without_a_scored_token_is_told_and_left_out(served: Served, place: int) -> None:
    """The place 256 is the first of a second request."""
    texts: list[str | tuple[int, ...]] = [(65, 66)] * 256
    whole = served.client.score(texts)
    texts.insert(place, (65,))
    scored = served.client.score(texts)
    lone = scored.items[place]
    assert (lone.tokens, lone.logprob) == (0, 0)
    assert math.isnan(lone.perplexity)
    assert scored.tokens == whole.tokens == 256
    assert scored.perplexity == pytest.approx(whole.perplexity, rel=1e-9)


def test_a_score_of_nothing_is_no_number(served: Served) -> None:
    for scored in (
        served.client.score([(65,)]),
        served.client.score([("a" * 90, "b")], max_length=30, scope="answer"),
    ):
        assert [item.tokens for item in scored.items] == [scored.tokens] == [0]
        assert math.isnan(scored.perplexity)

"""Conversations with OpenAI's own client, on a base that has a chat template."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import openai
import pytest
from tests.integration.harness import LoopThread, Served, start
from tests.makers import save_base, tiny_gpt2, tiny_tokenizer

if TYPE_CHECKING:
    from openai.types.chat import ChatCompletionMessageParam


@pytest.fixture
def chatty(tmp_path: Path) -> Iterator[Served]:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = (
        "{% for message in messages %}<{{ message['role'] }}>{{ message['content'] }}{% endfor %}"
    )
    loop = LoopThread()
    base = save_base(tiny_gpt2(n_positions=256), tmp_path / "base", tokenizer)
    server = start(loop, base, tmp_path / "state", http_listen="127.0.0.1:0")
    yield server
    server.stop()
    loop.close()


def test_an_answer_whole_as_a_stream_and_with_log_probabilities(chatty: Served) -> None:
    messages: list[ChatCompletionMessageParam] = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": [{"type": "text", "text": "Hello"}]},
    ]
    expected = chatty.client.generate(
        [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello"}],
        temperature=0,
        max_new_tokens=12,
        logprobs=True,
    )
    url = f"http://{chatty.server.http_address}/v1"
    with openai.OpenAI(base_url=url, api_key="none") as client:
        whole = client.chat.completions.create(
            model="base",
            messages=messages,
            temperature=0,
            max_completion_tokens=12,
            logprobs=True,
            top_logprobs=2,
        )
        stream = client.chat.completions.create(
            model="base", messages=messages, temperature=0, max_completion_tokens=12, stream=True
        )
        text = "".join(c.delta.content or "" for chunk in stream for c in chunk.choices)
    (choice,) = whole.choices
    assert choice.message.content == text == expected.text
    assert choice.logprobs is not None
    assert choice.logprobs.content is not None
    assert [each.logprob for each in choice.logprobs.content] == pytest.approx(
        expected.logprobs, abs=1e-4
    )
    joined = bytes(byte for each in choice.logprobs.content for byte in each.bytes or ())
    assert joined.decode(errors="replace") == text

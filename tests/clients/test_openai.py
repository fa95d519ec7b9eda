"""OpenAI's own client."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator

import openai
import pytest
from tests.integration.harness import Served

PROMPT = "Question: What is glaucoma ?\nAnswer:"


@pytest.fixture
def client(served: Served) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=base_url(served), api_key="none") as client:
        yield client


def base_url(served: Served) -> str:
    return f"http://{served.server.http_address}/v1"


def test_models(client: openai.OpenAI) -> None:
    names = ["default", "base", "finance", "math", "medicine", "qa"]
    assert [model.id for model in client.models.list()] == names
    assert client.models.retrieve("math=1;medicine=0.5").id == "math=1;medicine=0.5"


def test_a_text_whole_and_as_a_stream(client: openai.OpenAI, served: Served) -> None:
    expected = served.client.generate(PROMPT, mix="math=1,medicine=0.5", temperature=0)
    whole = client.completions.create(model="qa", prompt=PROMPT, temperature=0)
    assert whole.choices[0].text == expected.text
    assert whole.system_fingerprint == expected.mix.digest
    assert whole.usage is not None
    assert whole.usage.completion_tokens == len(expected.token_ids)
    stream = client.completions.create(
        model="math=1;medicine=0.5",
        prompt=PROMPT,
        temperature=0,
        stream=True,
        stream_options={"include_usage": True},
    )
    chunks = list(stream)
    assert "".join(c.text for chunk in chunks for c in chunk.choices) == expected.text
    assert chunks[-1].usage == whole.usage


def test_the_mix_may_be_an_object(client: openai.OpenAI, served: Served) -> None:
    found = client.completions.with_raw_response.create(
        model="default",
        prompt=PROMPT,
        max_tokens=3,
        temperature=0,
        extra_body={"mix": {"finance": -0.5, "math": 1}},
    )
    expected = served.client.generate(
        PROMPT, mix={"finance": -0.5, "math": 1}, max_new_tokens=3, temperature=0
    )
    assert found.headers["x-superpose-mix-digest"] == expected.mix.digest
    assert found.parse().choices[0].text == expected.text


def test_log_probabilities(client: openai.OpenAI, served: Served) -> None:
    expected = served.client.generate(
        PROMPT, mix="math", max_new_tokens=8, temperature=0, logprobs=True, top_logprobs=2
    )
    found = client.completions.create(
        model="math", prompt=PROMPT, max_tokens=8, temperature=0, logprobs=2
    )
    logprobs = found.choices[0].logprobs
    assert logprobs is not None
    assert logprobs.token_logprobs == pytest.approx(expected.logprobs, abs=1e-4)
    assert logprobs.tokens is not None
    assert "".join(logprobs.tokens) == expected.text
    assert logprobs.top_logprobs is not None
    assert [len(top) for top in logprobs.top_logprobs] == [2] * 8


def test_two_at_once_asynchronously(served: Served) -> None:
    async def work() -> list[str]:
        async with openai.AsyncOpenAI(base_url=base_url(served), api_key="none") as client:

            async def read(model: str) -> str:
                stream = await client.completions.create(
                    model=model, prompt=PROMPT, temperature=0, max_tokens=20, stream=True
                )
                return "".join([c.text async for chunk in stream for c in chunk.choices])

            return [*await asyncio.gather(read("math"), read("medicine"))]

    expected = [
        served.client.generate(PROMPT, mix=mix, max_new_tokens=20, temperature=0).text
        for mix in ("math", "medicine")
    ]
    assert asyncio.run(work()) == expected


def test_errors_are_the_clients_own(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError) as missing:
        client.completions.create(model="law", prompt=PROMPT)
    assert missing.value.code == "DOMAIN_NOT_FOUND"
    with pytest.raises(openai.BadRequestError) as wrong:
        client.completions.create(model="math", prompt=PROMPT, n=2)
    assert (wrong.value.code, wrong.value.param) == ("UNSUPPORTED_FIELD", "n")
    with pytest.raises(openai.BadRequestError) as chat:
        client.chat.completions.create(
            model="math", messages=[{"role": "user", "content": "What is glaucoma?"}]
        )
    assert chat.value.code == "NO_CHAT_TEMPLATE"

"""Texts and scores over HTTP mean what they mean over gRPC, and in transformers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.integration.harness import PROMPT, Family, LoopThread, Served, held, start
from tests.integration.http_client import Answer, Http
from tests.makers import save_base, tiny_tokenizer

TEMPLATE = (
    "{% for message in messages %}<{{ message['role'] }}>{{ message['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
GREEDY = {"temperature": 0, "ignore_eos": True, "return_token_ids": True}
MIXES: tuple[Mapping[str, float], ...] = ({}, {"a": 1.0}, {"a": 0.5, "b": -1.0}, {"b": 1, "c": 2})


@pytest.fixture(scope="module")
def chatty(
    loop: LoopThread, gpt2: Family, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Served]:
    """A server of a base with a chat template; `a` is the default mix."""
    folder = tmp_path_factory.mktemp("chatty")
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = TEMPLATE
    base = save_base(gpt2.model, folder / "base", tokenizer)
    server = start(loop, base, folder / "state", http_listen="127.0.0.1:0")
    try:
        gpt2.push_all(server.client)
        server.client.add("a")
        yield server
    finally:
        server.stop()


@pytest.fixture
def http(chatty: Served) -> Http:
    chatty.recorder.forget()
    return Http(chatty.server.http_address)


def complete(http: Http, prompt: Any, **fields: Any) -> Answer:
    return http.ask("POST", "/v1/completions", {"prompt": prompt, **fields})


def chat(http: Http, messages: Any, **fields: Any) -> Answer:
    return http.ask("POST", "/v1/chat/completions", {"messages": messages, **fields})


def only(answer: Answer) -> Any:
    """Return the one choice of an answer."""
    (choice,) = answer.json["choices"]
    return choice


def parts(events: list[Any], index: int = 0) -> Iterator[Any]:
    """Return what the events of a stream add to one of its choices."""
    return (choice for event in events for choice in event["choices"] if choice["index"] == index)


def written(mix: Mapping[str, float], separator: str) -> str:
    return separator.join(f"{name}={weight}" for name, weight in mix.items()) or "base"


def test_one_text_has_the_same_tokens_through_every_door_under_four_mixes_in_one_batch(
    chatty: Served, http: Http, gpt2: Family
) -> None:
    def over_http(mix: Mapping[str, float]) -> list[int]:
        fields = {"model": written(mix, ";"), "seed": 5, "max_tokens": 12, **GREEDY}
        tokens: list[int] = only(complete(http, PROMPT, **fields))["token_ids"]
        return tokens

    def over_http_as_a_stream(mix: Mapping[str, float]) -> list[int]:
        fields = {"mix": mix, "seed": 5, "max_tokens": 12, "stream": True, **GREEDY}
        events = complete(http, PROMPT, **fields).events
        return [token for part in parts(events) for token in part["token_ids"]]

    def over_grpc(mix: Mapping[str, float]) -> list[int]:
        made = chatty.client.generate(
            PROMPT, mix=mix, temperature=0, ignore_eos=True, seed=5, max_new_tokens=12
        )
        return list(made.token_ids)

    ways = (over_http, over_http_as_a_stream, over_grpc)
    with ThreadPoolExecutor(12) as pool, held(chatty.recorder) as let_go:
        begun = [[pool.submit(way, mix) for way in ways] for mix in MIXES]
        for _ in range(12):
            chatty.recorder.submitted.get(timeout=60)
        let_go.set()
        found = [[each.result() for each in row] for row in begun]
    assert max(len(step.rows) for step in chatty.recorder.steps) == 12

    ids = torch.tensor([chatty.runtime.texts.prompt(PROMPT)])
    for mix, (whole, stream, grpc) in zip(MIXES, found, strict=True):
        reference = gpt2.folded(mix).generate(  # type: ignore[operator]
            ids, do_sample=False, max_new_tokens=12, min_new_tokens=12, pad_token_id=256
        )
        assert whole == stream == grpc == reference[0, ids.shape[1] :].tolist()


SAMPLINGS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "top_p": ({"temperature": 0.9, "top_p": 0.8}, {}),
    "all of them": (
        {
            "temperature": 1.3,
            "top_k": 40,
            "min_p": 0.01,
            "repetition_penalty": 1.2,
            "frequency_penalty": 0.5,
            "presence_penalty": -0.5,
            "ignore_eos": True,
        },
        {},
    ),
    "names": (
        {"max_tokens": 30, "min_tokens": 9, "logit_bias": {"65": 90, "66": 90}, "stop": "A"},
        {
            "max_new_tokens": 30,
            "min_new_tokens": 9,
            "logit_bias": {65: 90, 66: 90},
            "stop": ["A"],
        },
    ),
    "max_completion_tokens": (
        {"max_completion_tokens": 3, "stop": ["x", "y"]},
        {"max_new_tokens": 3, "stop": ["x", "y"]},
    ),
    "stop tokens": ({"stop_token_ids": [66, 67], "max_tokens": 200}, {"max_new_tokens": 200}),
    "left open": ({}, {}),
}


@pytest.mark.parametrize("name", SAMPLINGS)
def test_one_seed_draws_the_same_text_as_over_grpc(chatty: Served, http: Http, name: str) -> None:
    fields, renamed = SAMPLINGS[name]
    options = {
        key: value
        for key, value in fields.items()
        if key not in ("max_tokens", "max_completion_tokens", "min_tokens")
    }
    over_grpc = chatty.client.generate(PROMPT, mix="b", seed=11, **{**options, **renamed})
    reply = complete(http, PROMPT, model="b", seed=11, return_token_ids=True, **fields)
    choice = only(reply)
    assert choice["token_ids"] == list(over_grpc.token_ids)
    assert choice["text"] == over_grpc.text
    assert choice["finish_reason"] == over_grpc.finish_reason.name.lower()
    assert reply.json["usage"] == {
        "prompt_tokens": over_grpc.usage.prompt_tokens,
        "completion_tokens": over_grpc.usage.completion_tokens,
        "total_tokens": over_grpc.usage.prompt_tokens + over_grpc.usage.completion_tokens,
    }


@pytest.mark.parametrize("echo", [False, True], ids=["answer", "echo"])
def test_streams_of_several_prompts_are_the_whole_answers(http: Http, echo: bool) -> None:
    prompts = ["First", "The second one", "3"]
    fields = {"mix": {"a": 1, "c": -0.5}, "seed": 3, "max_tokens": 20, "echo": echo, "logprobs": 2}
    whole = complete(http, prompts, return_token_ids=True, **fields)
    stream = complete(
        http,
        prompts,
        return_token_ids=True,
        stream=True,
        stream_options={"include_usage": True},
        **fields,
    )
    *events, last = stream.events
    assert {event["usage"] for event in events} == {None}
    assert (last["choices"], last["usage"]) == ([], whole.json["usage"])
    for index, prompt in enumerate(prompts):
        choice = whole.json["choices"][index]
        pieces = list(parts(events, index))
        assert choice["index"] == index
        assert choice["text"].startswith(prompt) == echo
        assert "".join(piece["text"] for piece in pieces) == choice["text"]
        assert [i for piece in pieces for i in piece["token_ids"]] == choice["token_ids"]
        assert [piece["finish_reason"] for piece in pieces] == [None] * (len(pieces) - 1) + [
            "length"
        ]
        for name in ("tokens", "text_offset"):
            assert [x for piece in pieces for x in piece["logprobs"][name]] == choice["logprobs"][
                name
            ]
    for event in (*events, last):
        assert event["object"] == whole.json["object"] == "text_completion"
        assert event["system_fingerprint"] == whole.json["system_fingerprint"]


def test_a_stream_may_tell_its_usage_all_along(http: Http) -> None:
    """As vLLM's does, and guidellm asks it to."""
    options = {"include_usage": True, "continuous_usage_stats": True}
    fields = {"max_tokens": 9, "stream": True, "stream_options": options, **GREEDY}
    *events, last = complete(http, PROMPT, **fields).events
    made = 0
    for event in events:
        (choice,) = event["choices"]
        made += len(choice["token_ids"])
        assert event["usage"]["completion_tokens"] == made
    assert last["usage"] == events[-1]["usage"]
    assert made == 9
    del options["include_usage"]
    assert all("usage" not in event for event in complete(http, PROMPT, **fields).events)


def likeliest(model: torch.nn.Module, ids: list[int], count: int) -> list[list[int]]:
    """Return the likeliest tokens in the place of each but the first, by transformers."""
    with torch.inference_mode():
        logits = model(torch.tensor([ids])).logits[0, :-1]
    found: list[list[int]] = logits.topk(count).indices.tolist()
    return found


def test_log_probabilities_of_an_answer_are_those_over_grpc(chatty: Served, http: Http) -> None:
    over_grpc = chatty.client.generate(
        PROMPT, mix="b", temperature=0, max_new_tokens=12, logprobs=True, top_logprobs=3
    )
    choice = only(complete(http, PROMPT, model="b", max_tokens=12, logprobs=3, **GREEDY))
    found = choice["logprobs"]
    assert choice["token_ids"] == list(over_grpc.token_ids)
    assert found["token_logprobs"] == pytest.approx(over_grpc.logprobs, abs=1e-4)
    for top, over in zip(found["top_logprobs"], over_grpc.top_logprobs, strict=True):
        assert list(top.values()) == pytest.approx(over.logprobs, abs=1e-4)
    assert_offsets(choice["text"], found)


def assert_offsets(text: str, logprobs: Mapping[str, list[Any]]) -> None:
    """Check that tokens that are whole characters stand in the text where they are said to."""
    stand = [
        text.startswith(token, offset)
        for token, offset in zip(logprobs["tokens"], logprobs["text_offset"], strict=True)
        if not token.startswith("bytes:")
    ]
    assert stand
    assert all(stand)


@pytest.mark.parametrize("most", [0, 1])
@pytest.mark.parametrize("as_ids", [False, True], ids=["text", "ids"])
def test_an_echoed_prompt_has_the_log_probabilities_of_score(
    chatty: Served, http: Http, gpt2: Family, most: int, as_ids: bool
) -> None:
    texts = ["The sum of zwei Häuser", "abc", "?"]
    ids = [chatty.runtime.texts.prompt(text) for text in texts]
    scored = chatty.client.score(texts, mix={"a": 1, "b": 0.5}, logprobs=True)
    reply = complete(
        http,
        ids if as_ids else texts,
        model="a=1;b=0.5",
        echo=True,
        logprobs=1,
        max_tokens=most,
        temperature=0,
    )
    model = gpt2.folded({"a": 1, "b": 0.5})
    for text, tokens, item, choice in zip(
        texts, ids, scored.items, reply.json["choices"], strict=True
    ):
        found = choice["logprobs"]
        assert choice["text"].startswith(text)
        assert len(found["tokens"]) == len(tokens) + most
        first, *rest = found["token_logprobs"][: len(tokens)]
        assert (first, found["top_logprobs"][0]) == (None, None)
        assert rest == pytest.approx(item.logprobs, abs=1e-6)
        assert_offsets(choice["text"], found)
        if len(tokens) < 2:
            continue
        for target, (best,), logprob, top in zip(
            tokens[1:],
            likeliest(model, tokens, 1),
            rest,
            found["top_logprobs"][1 : len(tokens)],
            strict=True,
        ):
            # As evaluation harnesses find out whether a text is the greedy one.
            assert (max(top.values()) == logprob) == (best == target)
    made = most * len(texts)
    assert reply.json["usage"]["completion_tokens"] == made
    assert reply.json["usage"]["prompt_tokens"] == sum(map(len, ids))


def test_conversations_are_those_over_grpc(chatty: Served, http: Http) -> None:
    messages = [{"role": "system", "content": "Be brief"}, {"role": "user", "content": "Hällo"}]
    over_grpc = chatty.client.generate(
        messages, mix="c", temperature=0, max_new_tokens=10, ignore_eos=True, logprobs=True
    )
    in_parts = [
        messages[0],
        {
            "role": "user",
            "content": [{"type": "text", "text": "Häl"}, {"type": "text", "text": "lo"}],
        },
    ]
    fields = {"messages": in_parts, "model": "c", "max_tokens": 10, **GREEDY}
    whole = chat(http, **fields, logprobs=True, top_logprobs=2)
    choice = only(whole)
    assert choice["token_ids"] == list(over_grpc.token_ids)
    assert choice["message"] == {
        "role": "assistant",
        "content": over_grpc.text,
        "refusal": None,
    }
    content = choice["logprobs"]["content"]
    assert [each["logprob"] for each in content] == pytest.approx(over_grpc.logprobs, abs=1e-4)
    joined = bytes(byte for each in content for byte in each["bytes"])
    assert joined.decode(errors="replace") == over_grpc.text
    for each in content:
        # Greedy: the first of the likeliest is the token itself.
        assert each["top_logprobs"][0] == {k: each[k] for k in ("token", "logprob", "bytes")}
        assert len(each["top_logprobs"]) == 2
    stream = chat(http, **fields, stream=True).events
    pieces = [piece["delta"] for piece in parts(stream)]
    assert "".join(piece["content"] for piece in pieces) == over_grpc.text
    assert [piece.get("role") for piece in pieces] == ["assistant"] + [None] * (len(pieces) - 1)
    assert {event["object"] for event in stream} == {"chat.completion.chunk"}


def test_an_answer_says_which_mix_it_was_made_with(chatty: Served, http: Http) -> None:
    state = chatty.client.mix()
    for model, mix in (("default", None), ("b,c=-0.5", {"b": 1, "c": -0.5}), ("base", {})):
        expected = chatty.client.score(["ab"], mix=mix).mix
        reply = complete(http, PROMPT, model=model, max_tokens=1)
        assert reply.json["model"] == model
        assert reply.json["system_fingerprint"] == expected.digest
        assert reply.headers["x-superpose-mix-digest"] == expected.digest
        assert reply.headers["x-superpose-generation"] == str(state.generation)
    default = complete(http, PROMPT, max_tokens=1)
    assert default.json["model"] == "default"
    assert default.json["system_fingerprint"] == state.digest
    beside = complete(http, PROMPT, max_tokens=1, model="default", mix={})
    assert (
        beside.json["system_fingerprint"]
        == complete(http, PROMPT, max_tokens=1, model="base").json["system_fingerprint"]
    )


def test_models_are_the_mixes_that_a_client_can_pick_from(chatty: Served, http: Http) -> None:
    chatty.client.name_mix("qa", "a=1,b=0.5")
    try:
        models = http.ask("GET", "/v1/models").json
        assert models["object"] == "list"
        assert [model["id"] for model in models["data"]] == [
            *("default", "base", "a", "b", "c", "qa")
        ]
        for model in models["data"]:
            asked = complete(http, PROMPT, model=model["id"], max_tokens=1)
            assert asked.json["system_fingerprint"] == model["mix_digest"]
            assert model == http.ask("GET", f"/v1/models/{model['id']}").json
            assert model["object"] == "model"
        assert models["data"][-1]["mix"] == {"a": 1, "b": 0.5}
        assert http.ask("GET", "/v1/models/a%3D2;c").json["mix"] == {"a": 2, "c": 1}
    finally:
        chatty.client.unname_mix("qa")


def test_scores_are_those_over_grpc(chatty: Served, http: Http) -> None:
    rows = [("2 + 2 ?", "4"), ("a", "b c")]
    items = [{"question_answer": {"question": q, "answer": a}} for q, a in rows]
    for scope in ("all", "answer"):
        over_grpc = chatty.client.score(rows, mix="b", scope=scope, logprobs=True, max_length=40)
        reply = http.ask(
            "POST",
            "/v1/score",
            {"items": items, "model": "b", "scope": scope, "logprobs": True, "max_length": 40},
        )
        assert reply.json["tokens"] == over_grpc.tokens
        assert reply.json["perplexity"] == pytest.approx(over_grpc.perplexity, rel=1e-6)
        for found, item in zip(reply.json["items"], over_grpc.items, strict=True):
            assert found["logprobs"] == pytest.approx(item.logprobs, abs=1e-6)
            assert found["tokens"] == item.tokens
        assert reply.json["mix"]["digest"] == over_grpc.mix.digest
        assert reply.json["mix"]["entries"][0]["domain"] == "b"
    short = http.ask("POST", "/v1/score", {"items": [{"token_ids": [65]}, {"text": "ab"}]}).json
    assert [item["tokens"] for item in short["items"]] == [0, 1]
    assert short["items"][0]["perplexity"] is None
    assert [item["logprobs"] for item in short["items"]] == [[], []]


def test_scores_under_several_mixes_are_those_over_grpc(chatty: Served, http: Http) -> None:
    texts = ["The sum of two", "abc"]
    items = [{"text": text} for text in texts]
    over_grpc = chatty.client.score(texts, mixes=MIXES, logprobs=True)
    found = http.ask("POST", "/v1/score", {"items": items, "mixes": MIXES, "logprobs": True}).json
    assert [block["mix"]["digest"] for block in found["mixes"]] == [
        chatty.client.score(texts, mix=mix).mix.digest for mix in MIXES
    ]
    for block, expected in zip(found["mixes"], over_grpc.mixes, strict=True):
        assert block["perplexity"] == pytest.approx(expected.perplexity, rel=1e-6)
        for item, scored in zip(block["items"], expected.items, strict=True):
            assert item["logprobs"] == pytest.approx(scored.logprobs, abs=1e-6)
    first = {name: found[name] for name in found["mixes"][0]}
    assert first == found["mixes"][0]
    assert http.ask("POST", "/v1/score", {"items": items, "mix": {}}).json["mixes"] == []


@pytest.mark.parametrize(
    ("asked", "reason"),
    [
        ({"mixes": [{"a": 1}], "mix": {}}, "MIX_GIVEN_TWICE"),
        ({"mixes": [{"a": 1}], "model": "b"}, "MIX_GIVEN_TWICE"),
        ({"mixes": []}, "NO_MIXES"),
        ({"mixes": {"a": 1}}, "INVALID_FIELD"),
        ({"mixes": [{"a": 1}, {"a": "1"}]}, "INVALID_MIX"),
        ({"mixes": [{}] * 2049}, "TOO_MANY_ROWS"),
    ],
)
def test_several_mixes_that_mean_nothing_are_refused(
    http: Http, asked: dict[str, Any], reason: str
) -> None:
    answer = http.ask("POST", "/v1/score", {"items": [{"text": "abc"}], **asked})
    assert answer.outcome == (400, reason)


def test_fields_that_change_nothing_are_ignored_and_null_is_absent(http: Http) -> None:
    fields = {"model": "b", "max_tokens": 5, "temperature": 0}
    plain = only(complete(http, PROMPT, **fields))
    more = complete(
        http,
        PROMPT,
        **fields,
        user="me",
        metadata={"a": 1},
        store=True,
        n=1,
        best_of=None,
        suffix=None,
        response_format=None,
    )
    assert plain == only(more)


def test_a_request_id_comes_back(http: Http) -> None:
    reply = http.ask(
        "POST",
        "/v1/completions",
        {"prompt": PROMPT, "max_tokens": 1},
        headers={"x-request-id": "my request/1"},
    )
    assert reply.headers["x-request-id"] == "my request/1"
    assert reply.json["id"] == "cmpl-my request/1"
    assert http.ask("GET", "/v1/nothing").headers["x-request-id"]


LONG = "x" * ((1 << 20) + 1)
REFUSALS: dict[str, tuple[dict[str, Any], int, str, str | None, str]] = {
    "max_tokens": ({"max_tokens": 2000}, 400, "MAX_NEW_TOKENS_TOO_LARGE", "max_tokens", "max_tok"),
    "two limits": (
        {"max_tokens": 3, "max_completion_tokens": 4},
        *(400, "INVALID_SAMPLING", "max_completion_tokens", "max_tokens and"),
    ),
    "min_tokens": (
        {"max_tokens": 3, "min_tokens": 4},
        *(400, "INVALID_SAMPLING", "min_tokens", "min_tokens is 4: use from 0 to max_tokens"),
    ),
    "logprobs": ({"logprobs": 21}, 400, "INVALID_SAMPLING", "logprobs", "logprobs is 21"),
    "temperature": ({"temperature": -1}, 400, "INVALID_SAMPLING", "temperature", "temperature is"),
    "stop token": (
        {"stop_token_ids": [99999]},
        *(400, "TOKEN_OUT_OF_RANGE", "stop_token_ids", "stop_token_ids holds token 99999"),
    ),
    "bias": ({"logit_bias": {"99999": 1}}, 400, "TOKEN_OUT_OF_RANGE", "logit_bias", "logit_bias"),
    "empty": ({"prompt": ""}, 400, "PROMPT_EMPTY", "prompt", "the prompt is empty"),
    "token": ({"prompt": [99999]}, 400, "TOKEN_OUT_OF_RANGE", "prompt", "prompt holds token 99999"),
    "too long": ({"prompt": [65] * 1025}, 400, "PROMPT_TOO_LONG", "prompt", "1025 tokens"),
    "no room": ({"prompt": [65] * 1024}, 400, "PROMPT_TOO_LONG", "prompt", "answer included"),
    "huge": ({"prompt": LONG}, 400, "TEXT_TOO_LONG", "prompt", "prompt has 1048577 characters"),
    "no prompts": ({"prompt": []}, 400, "BAD_ITEM_COUNT", "prompt", "prompt has 0 texts"),
    "no domain": ({"model": "nothing"}, 404, "DOMAIN_NOT_FOUND", None, "'nothing'"),
    "no mix": ({"model": "a=b"}, 400, "INVALID_MIX", "model", "GET /v1/models"),
    "half a name": ({"model": "gpt-4/x"}, 400, "INVALID_MIX", "model", "not a valid name"),
    "no mix object": ({"mix": {"a": "1"}}, 400, "INVALID_MIX", "mix", "write a number"),
    "two mixes": ({"model": "a", "mix": {}}, 400, "TWO_MIXES", "mix", "leave one out"),
    "stream options": (
        {"stream_options": {"include_usage": True}},
        *(400, "INVALID_FIELD", "stream_options", "stream true"),
    ),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_errors_name_fields_as_they_are_over_http(http: Http, name: str) -> None:
    fields, status, reason, param, words = REFUSALS[name]
    answer = http.ask("POST", "/v1/completions", {"prompt": PROMPT, **fields})
    error = answer.json["error"]
    assert (answer.outcome, error["param"]) == ((status, reason), param)
    assert words in error["message"]
    assert error["type"] == "invalid_request_error"


@pytest.mark.parametrize("prompt", [[65] * 1024, "y" * 1024])
def test_a_prompt_that_fills_the_context_can_be_echoed(http: Http, prompt: Any) -> None:
    """Where nothing comes behind it, it needs no room."""
    found = only(complete(http, prompt, max_tokens=0, echo=True, logprobs=0))
    assert len(found["logprobs"]["tokens"]) == 1024


def test_a_base_without_chat_template_says_so(
    loop: LoopThread, gpt2: Family, tmp_path: Path
) -> None:
    server = start(loop, gpt2.base, tmp_path / "state", http_listen="127.0.0.1:0")
    try:
        answer = chat(Http(server.server.http_address), [{"role": "user", "content": "hi"}])
    finally:
        server.stop()
    assert answer.outcome == (400, "NO_CHAT_TEMPLATE")
    assert answer.json["error"]["param"] == "messages"
    assert "no chat template" in answer.json["error"]["message"]


def test_a_generation_that_is_not_reached_is_told(http: Http) -> None:
    generation = int(complete(http, "x", max_tokens=1).headers["x-superpose-generation"])
    assert complete(http, "x", max_tokens=1, min_generation=generation).status == 200
    later = {"min_generation": generation + 1}
    for answer in (
        complete(http, "x", max_tokens=1, **later),
        chat(http, [{"role": "user", "content": "x"}], max_tokens=1, **later),
        http.ask("POST", "/v1/score", {"items": [{"text": "x y"}], **later}),
    ):
        assert answer.status == 503
        assert answer.json["error"]["code"] == "GENERATION_NOT_REACHED"
        assert answer.json["error"]["metadata"] == {"generation": str(generation)}
    assert complete(http, "x", min_generation=-1).status == 400

"""What bodies may hold, and what is refused by name."""

from __future__ import annotations

from typing import Any

import pytest

from superpose_adapters.mix import Mix
from superpose_server.door.http import chat, completions, score
from superpose_server.door.http.fields import Form
from superpose_server.errors import InvalidArgument

MESSAGE = {"role": "user", "content": "hi"}
LEAST: dict[str, tuple[Form, dict[str, Any]]] = {
    "completions": (completions.FORM, {"prompt": "a"}),
    "chat": (chat.FORM, {"messages": [MESSAGE]}),
    "score": (score.FORM, {"items": [{"text": "a"}]}),
}


def refused(kind: str, fields: dict[str, Any]) -> InvalidArgument:
    form, least = LEAST[kind]
    with pytest.raises(InvalidArgument) as caught:
        form.read({**least, **fields})
    return caught.value


@pytest.mark.parametrize("kind", LEAST)
def test_what_is_needed_is_enough_and_without_it_nothing_is(kind: str) -> None:
    form, least = LEAST[kind]
    assert form.read(least).keys() == least.keys()
    error = refused(kind, {next(iter(least)): None})
    assert (error.reason, error.field) == ("MISSING_FIELD", next(iter(least)))


@pytest.mark.parametrize("kind", LEAST)
@pytest.mark.parametrize("name", ["best_off", "guided_json", "min_new_tokens", "Prompt", ""])
def test_what_is_not_known_is_refused_unless_it_is_null(kind: str, name: str) -> None:
    error = refused(kind, {name: 1})
    assert (error.reason, error.field) == ("UNKNOWN_FIELD", name)
    form, least = LEAST[kind]
    assert form.read({**least, name: None}).keys() == least.keys()


# OpenAI's fields that are not served here: what they hold where they ask for nothing, and more.
UNSERVED: list[tuple[str, str, list[Any], Any]] = [
    ("completions", "n", [1], 2),
    ("completions", "n", [1], True),
    ("completions", "best_of", [1], 2),
    ("completions", "suffix", [""], "end"),
    ("chat", "n", [1], 3),
    ("chat", "tools", [[]], [{"type": "function"}]),
    ("chat", "tool_choice", ["none", "auto"], "required"),
    ("chat", "functions", [[]], [{}]),
    ("chat", "function_call", ["none", "auto"], {"name": "f"}),
    ("chat", "response_format", [{"type": "text"}], {"type": "json_object"}),
    ("chat", "modalities", [["text"]], ["text", "audio"]),
]


@pytest.mark.parametrize(("kind", "name", "allowed", "other"), UNSERVED)
def test_what_is_not_served_may_hold_its_default_alone(
    kind: str, name: str, allowed: list[Any], other: Any
) -> None:
    form, least = LEAST[kind]
    for value in allowed:
        form.read({**least, name: value})
    error = refused(kind, {name: other})
    assert (error.reason, error.field) == ("UNSUPPORTED_FIELD", name)


@pytest.mark.parametrize("kind", ["completions", "chat"])
def test_what_changes_nothing_may_hold_anything(kind: str) -> None:
    form, least = LEAST[kind]
    names = ("user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key")
    values: list[Any] = [1, "x", {"a": []}, False]
    for value in values:
        assert form.read({**least, **dict.fromkeys(names, value)}).keys() == least.keys()


WRONG: list[tuple[str, dict[str, Any], str]] = [
    ("completions", {"prompt": 5}, "prompt"),
    ("completions", {"prompt": {}}, "prompt"),
    ("completions", {"prompt": ["a", 5]}, "prompt"),
    ("completions", {"prompt": [1, "a"]}, "prompt"),
    ("completions", {"prompt": [[1, True]]}, "prompt[0]"),
    ("completions", {"prompt": [[1.0]]}, "prompt[0]"),
    ("completions", {"prompt": [1, 2**70]}, "prompt"),
    ("completions", {"prompt": [-1]}, "prompt"),
    ("completions", {"stop_token_ids": [2**32]}, "stop_token_ids"),
    ("completions", {"temperature": "1"}, "temperature"),
    ("completions", {"temperature": True}, "temperature"),
    ("completions", {"temperature": 10**400}, "temperature"),
    ("completions", {"temperature": 1e999}, "temperature"),
    ("completions", {"max_tokens": 1.5}, "max_tokens"),
    ("completions", {"max_tokens": -1}, "max_tokens"),
    ("completions", {"max_tokens": True}, "max_tokens"),
    ("completions", {"logprobs": True}, "logprobs"),
    ("completions", {"seed": -1}, "seed"),
    ("completions", {"seed": 2**64}, "seed"),
    ("completions", {"stop": [1]}, "stop[0]"),
    ("completions", {"stop": 1}, "stop"),
    ("completions", {"echo": 1}, "echo"),
    ("completions", {"logit_bias": {"a": 1}}, "logit_bias"),
    ("completions", {"logit_bias": {"1": "x"}}, "logit_bias.1"),
    ("completions", {"logit_bias": {"5": 1, "05": -1}}, "logit_bias"),
    ("completions", {"logit_bias": [1]}, "logit_bias"),
    ("completions", {"stream_options": {"include_usage": 1}}, "stream_options.include_usage"),
    ("completions", {"stream_options": []}, "stream_options"),
    ("completions", {"model": 5}, "model"),
    ("chat", {"messages": "hi"}, "messages"),
    ("chat", {"messages": ["hi"]}, "messages[0]"),
    ("chat", {"messages": [{**MESSAGE, "content": 5}]}, "messages[0].content"),
    ("chat", {"messages": [{**MESSAGE, "content": ["hi"]}]}, "messages[0].content[0]"),
    ("chat", {"logprobs": 1}, "logprobs"),
    ("score", {"items": [5]}, "items[0]"),
    ("score", {"items": [{"token_ids": ["a"]}]}, "items[0].token_ids"),
    ("score", {"items": [{"token_ids": [2**64]}]}, "items[0].token_ids"),
    ("score", {"scope": "some"}, "scope"),
]


@pytest.mark.parametrize(("kind", "fields", "at"), WRONG)
def test_a_value_of_another_kind_is_refused_where_it_stands(
    kind: str, fields: dict[str, Any], at: str
) -> None:
    error = refused(kind, fields)
    assert (error.reason, error.field) == ("INVALID_FIELD", at)
    assert error.message.startswith(f"{at} is ")
    assert len(error.message) < 300


INNER: list[tuple[dict[str, Any], str, str]] = [
    ({"messages": [{"content": "hi"}]}, "MISSING_FIELD", "messages[0].role"),
    ({"messages": [{**MESSAGE, "name": "me"}]}, "UNKNOWN_FIELD", "messages[0].name"),
    (
        {"messages": [{**MESSAGE, "tool_calls": [{}]}]},
        "UNSUPPORTED_FIELD",
        "messages[0].tool_calls",
    ),
    (
        {"messages": [{**MESSAGE, "content": [{"type": "image_url", "image_url": {}}]}]},
        *("UNSUPPORTED_FIELD", "messages[0].content[0].type"),
    ),
    ({"stream_options": {"more": 1}}, "UNKNOWN_FIELD", "stream_options.more"),
]


@pytest.mark.parametrize(("fields", "reason", "at"), INNER)
def test_objects_within_a_body_are_held_to_the_same(
    fields: dict[str, Any], reason: str, at: str
) -> None:
    error = refused("chat", fields)
    assert (error.reason, error.field) == (reason, at)


def test_values_are_read_as_what_they_mean() -> None:
    asked = completions.FORM.read(
        {"prompt": [1, 2], "stop": "x", "logit_bias": {"7": 1}, "mix": {"a": 1, "b": 0}}
    )
    assert asked["prompt"] == [[1, 2]]
    assert asked["stop"] == ["x"]
    assert asked["logit_bias"] == {7: 1.0}
    assert asked["mix"] == Mix.of({"a": 1.0})
    for prompt, several in (("a", ["a"]), (["a", [1]], ["a", [1]]), ([[]], [[]]), ([], [])):
        assert completions.FORM.read({"prompt": prompt})["prompt"] == several
    content = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    (message,) = chat.FORM.read({"messages": [{**MESSAGE, "content": content}]})["messages"]
    assert message == {"role": "user", "content": "ab"}

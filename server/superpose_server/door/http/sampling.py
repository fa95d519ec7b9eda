"""The fields that say what to generate and how, the same for texts and conversations.

The names are OpenAI's where it has one and vLLM's where not; ranges are those of `SamplingParams`.
"""

from __future__ import annotations

import re
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from superpose_server.door.http.fields import (
    COUNT,
    FLAG,
    NUMBER,
    TEXT,
    TOKEN_IDS,
    Asked,
    Field,
    Form,
    ListOf,
    ignored,
    integer,
    only,
    refuse,
)
from superpose_server.engine.sampling import SamplingParams
from superpose_server.errors import InvalidArgument

_ID = re.compile("(0|[1-9][0-9]{0,9})")  # 05 would be 5 under another name.


@dataclass(frozen=True)
class _Biases:
    """{token id: bias}; JSON has texts for names only."""

    schema = {  # noqa: RUF012  # never changed
        "type": "object",
        "propertyNames": {"pattern": f"^{_ID.pattern}$"},
        "additionalProperties": {"type": "number"},
    }

    def read(self, value: Any, at: str) -> Mapping[int, float]:
        if not isinstance(value, dict) or not all(map(_ID.fullmatch, value)):
            refuse(value, at, 'an object of token ids and numbers, such as {"42": -100}')
        return {int(id): NUMBER.read(bias, f"{at}.{id}") for id, bias in value.items()}


_STREAM_OPTIONS = Form(
    "StreamOptions",
    (
        Field("include_usage", FLAG, "Send the usage in an event of its own, the last one."),
        Field("continuous_usage_stats", FLAG, "With include_usage: in every event, as it is then."),
        *ignored("include_obfuscation"),
    ),
)

# Fields of `SamplingParams`, and of a request, that have other names over HTTP.
_NAMES = {"max_new_tokens": "max_tokens", "min_new_tokens": "min_tokens"}
_FIELDS = {"token_ids": "prompt", "chat": "messages"}
_OPTIONS = (
    Field("temperature", NUMBER, "1 if absent; 0 is greedy."),
    Field("top_p", NUMBER, "Keep the fewest tokens whose probabilities sum to it."),
    Field("top_k", COUNT, "Keep the k likeliest tokens; 0: all."),
    Field("min_p", NUMBER, "Keep tokens at least so many times as probable as the likeliest one."),
    Field("repetition_penalty", NUMBER, "1: none."),
    Field("frequency_penalty", NUMBER, "0: none."),
    Field("presence_penalty", NUMBER, "0: none."),
    Field("logit_bias", _Biases(), "Added to the logits of tokens, by id."),
    Field("seed", integer(0, 2**64 - 1), "Same seed, same random numbers."),
    Field("stop", ListOf(TEXT, single=True), "The text ends before the first of these."),
    Field("stop_token_ids", TOKEN_IDS, "The text ends at the first of these."),
    Field("ignore_eos", FLAG, "Go on after an end-of-text token."),
)
GENERATION = (
    *_OPTIONS,
    Field("max_tokens", COUNT, "64 if absent, or what the context leaves if that is less."),
    Field("max_completion_tokens", COUNT, "The same as max_tokens."),
    Field("min_tokens", COUNT, "So many tokens come before the text may end."),
    Field("stream", FLAG, "Send the text as it is made, as server-sent events."),
    Field("stream_options", _STREAM_OPTIONS, "How to stream."),
    Field("return_token_ids", FLAG, "Send the ids of the new tokens beside their text."),
    *only({"n": [1]}),
    *ignored(
        "user",
        "metadata",
        "store",
        "service_tier",
        "safety_identifier",
        "prompt_cache_key",
        "prompt_cache_retention",
    ),
)
"""Fields of every request for a text."""


def max_tokens(asked: Asked) -> int | None:
    """Return how many tokens are asked for at most; None: that is left to the server.

    Raises:
        InvalidArgument: The two names of it say two things.
    """
    most = {asked[n] for n in ("max_tokens", "max_completion_tokens") if n in asked}
    if len(most) > 1:
        raise InvalidArgument(
            "max_tokens and max_completion_tokens differ: send one of them",
            "INVALID_SAMPLING",
            field="max_completion_tokens",
        )
    return next(iter(most), None)


def sampling_params(
    asked: Asked, *, max_new_tokens: int | None, logprobs: bool, top_logprobs: int
) -> SamplingParams:
    """Return what is asked for of the fields of `GENERATION`, and of those that are given.

    Raises:
        InvalidArgument: A value out of its range.
    """
    given = {field.name: asked[field.name] for field in _OPTIONS if field.name in asked}
    for name in ("stop", "stop_token_ids"):
        if name in given:
            given[name] = tuple(given[name])
    return SamplingParams(
        **given,
        max_new_tokens=max_new_tokens,
        min_new_tokens=asked.get("min_tokens", 0),
        logprobs=logprobs,
        top_logprobs=top_logprobs,
    )


def wants_usage(asked: Asked) -> bool:
    """Return whether a stream is to end with its usage.

    Raises:
        InvalidArgument: There are options of a stream, but no stream.
    """
    options = asked.get("stream_options")
    if options is not None and not asked.get("stream", False):
        raise InvalidArgument(
            "stream_options say how to stream: send stream true, or leave them out",
            "INVALID_FIELD",
            field="stream_options",
        )
    return bool(options and options.get("include_usage", False))


@contextmanager
def http_names(**more: str) -> Generator[None]:
    """Let errors of the inference layer name fields as they are over HTTP.

    Args:
        more: Names that only one kind of request has, {ours: its}.

    Raises:
        InvalidArgument: What was raised within, in these words.
    """
    names = _NAMES | more
    try:
        yield
    except InvalidArgument as error:
        message, field = error.message, error.field
        if field is not None:
            inner = field.removeprefix("options.")
            theirs = (names | _FIELDS).get(inner, inner)
            if message.startswith(field):
                message = theirs + message.removeprefix(field)
            field = theirs
        for ours, theirs in names.items():
            message = re.sub(rf"\b{ours}\b", theirs, message)
        raise InvalidArgument(
            message, error.reason, field=field, metadata=error.metadata
        ) from error

"""What texts and models are answered with, as JSON Schema: OpenAI's shapes, and what is ours."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

Schema = Mapping[str, Any]

_TEXT: Schema = {"type": "string"}
_COUNT: Schema = {"type": "integer", "minimum": 0}
_NUMBER: Schema = {"type": "number"}
_REASON: Schema = {"enum": ["stop", "length", "abort", None]}


def _object(members: Mapping[str, Schema], optional: Mapping[str, Schema] | None = None) -> Schema:
    return {
        "type": "object",
        "properties": {**members, **(optional or {})},
        "required": list(members),
        "additionalProperties": False,
    }


def _list(items: Schema) -> Schema:
    return {"type": "array", "items": items}


def _or_null(schema: Schema) -> Schema:
    return {"anyOf": [schema, {"type": "null"}]}


_TOKEN_IDS = {"token_ids": _list(_COUNT)}
_USAGE = _object({"prompt_tokens": _COUNT, "completion_tokens": _COUNT, "total_tokens": _COUNT})
_TEXT_LOGPROBS = _object(
    {
        "tokens": _list(_TEXT),
        "token_logprobs": _list(_or_null(_NUMBER)),
        "top_logprobs": _list(_or_null({"type": "object", "additionalProperties": _NUMBER})),
        "text_offset": _list(_COUNT),
    }
)
_TOKEN = {"token": _TEXT, "logprob": _NUMBER, "bytes": _list(_COUNT)}
_CHAT_LOGPROBS = _object(
    {
        "content": _list(_object({**_TOKEN, "top_logprobs": _list(_object(_TOKEN))})),
        "refusal": {"type": "null"},
    }
)


def _answer(kind: str, choice: Schema, usage: Mapping[str, Schema]) -> Schema:
    about = "Digest of the mix that it was made with."
    return _object(
        {
            "id": _TEXT,
            "object": {"const": kind},
            "created": _COUNT,
            "model": _TEXT,
            "system_fingerprint": {"type": "string", "description": about},
            "choices": _list(choice),
            **usage,
        },
        {"usage": _or_null(_USAGE)},
    )


_TEXT_CHOICE = _object(
    {
        "index": _COUNT,
        "text": _TEXT,
        "logprobs": _or_null(_TEXT_LOGPROBS),
        "finish_reason": _REASON,
    },
    _TOKEN_IDS,
)
_ROLE: Schema = {"const": "assistant"}


def _chat_choice(name: str, said: Schema) -> Schema:
    return _object(
        {
            "index": _COUNT,
            name: said,
            "logprobs": _or_null(_CHAT_LOGPROBS),
            "finish_reason": _REASON,
        },
        _TOKEN_IDS,
    )


COMPLETION = _answer("text_completion", _TEXT_CHOICE, {"usage": _USAGE})
COMPLETION_EVENT = _answer("text_completion", _TEXT_CHOICE, {})
CHAT = _answer(
    "chat.completion",
    _chat_choice(
        "message", _object({"role": _ROLE, "content": _TEXT, "refusal": {"type": "null"}})
    ),
    {"usage": _USAGE},
)
CHAT_EVENT = _answer(
    "chat.completion.chunk",
    _chat_choice("delta", _object({"content": _TEXT}, {"role": _ROLE})),
    {},
)
MODEL = _object(
    {
        "id": _TEXT,
        "object": {"const": "model"},
        "created": _COUNT,
        "owned_by": _TEXT,
        "max_model_len": _COUNT,
        "mix": {"type": "object", "additionalProperties": _NUMBER},
        "mix_digest": _TEXT,
    }
)
MODELS = _object({"object": {"const": "list"}, "data": _list(MODEL)})

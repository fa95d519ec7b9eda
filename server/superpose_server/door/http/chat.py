"""`/v1/chat/completions`: answers in conversations, for bases that have a chat template."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from superpose_server.door.http.connection import while_connected
from superpose_server.door.http.endpoint import Endpoint
from superpose_server.door.http.fields import (
    COUNT,
    FLAG,
    TEXT,
    Asked,
    Field,
    Form,
    ListOf,
    ignored,
    only,
)
from superpose_server.door.http.logprobs import ChatLogprobs
from superpose_server.door.http.mix import MIN_GENERATION, MIX, MODEL, requested_mix
from superpose_server.door.http.replies import CHAT, CHAT_EVENT
from superpose_server.door.http.sampling import (
    GENERATION,
    http_names,
    max_tokens,
    sampling_params,
    wants_usage,
)
from superpose_server.door.http.texts import FINISH_REASONS, Answer, Row, accept
from superpose_server.engine.sequence import Chunk
from superpose_server.engine.token_bytes import TokenBytes
from superpose_server.errors import InvalidArgument
from superpose_server.inference.inference import Inference
from superpose_server.inference.request import Chat, GenerateRequest

_PART = Form(
    "TextPart",
    (*only({"type": ["text"]}), Field("text", TEXT, required=True)),
)


class _Content:
    """A text, or parts of one as OpenAI's clients send them."""

    schema: Mapping[str, Any] = {"anyOf": [TEXT.schema, {"type": "array", "items": _PART.schema}]}

    def read(self, value: Any, at: str) -> str:
        if isinstance(value, list):
            return "".join(part["text"] for part in ListOf(_PART).read(value, at))
        text: str = TEXT.read(value, at)
        return text


_MESSAGE = Form(
    "Message",
    (
        Field("role", TEXT, "As the base's template has them: system, user, assistant.", True),
        Field("content", _Content(), required=True),
        *only({"tool_calls": [[]]}),
    ),
)
FORM = Form(
    "ChatCompletionRequest",
    (
        MODEL,
        MIX,
        MIN_GENERATION,
        Field("messages", ListOf(_MESSAGE), "The conversation so far.", required=True),
        Field("logprobs", FLAG, "The log-probability of each new token, of the model's own."),
        Field("top_logprobs", COUNT, "So many of the likeliest tokens in each place; at most 20."),
        *GENERATION,
        *only(
            {
                "tools": [[]],
                "tool_choice": ["none", "auto"],
                "functions": [[]],
                "function_call": ["none", "auto"],
                "response_format": [{"type": "text"}],
                "modalities": [["text"]],
            }
        ),
        *ignored("parallel_tool_calls"),
    ),
)


class ChatCompletions:
    """Answers from the inference layer."""

    def __init__(self, inference: Inference, token_bytes: TokenBytes) -> None:
        """Serve from these."""
        self._inference = inference
        self._logprobs = ChatLogprobs(token_bytes)

    def endpoints(self) -> tuple[Endpoint, ...]:
        """Return what is served."""
        return (
            Endpoint(
                "POST",
                "/v1/chat/completions",
                self.complete,
                "Answer in a conversation.",
                form=FORM,
                reply=CHAT,
                events=CHAT_EVENT,
            ),
        )

    async def complete(self, request: Request, asked: Asked) -> Response:
        """Answer with one choice.

        Raises:
            ClientDisconnect: Nobody waits for it any more.
            ServerError: The request is wrong, or cannot be run.
        """
        with http_names():
            answer = await while_connected(
                request.receive, self._accept(asked, request.state.request_id)
            )
        return await answer.respond(request)

    async def _accept(self, asked: Asked, request_id: str) -> Answer:
        wants_usage(asked)
        logprobs, top = asked.get("logprobs", False), asked.get("top_logprobs", 0)
        if top and not logprobs:
            raise InvalidArgument(
                "top_logprobs come with logprobs: send logprobs true",
                "INVALID_FIELD",
                field="top_logprobs",
            )
        options = sampling_params(
            asked, max_new_tokens=max_tokens(asked), logprobs=logprobs, top_logprobs=top
        )
        turns = tuple((each["role"], each["content"]) for each in asked["messages"])
        ids = await self._inference.encode(Chat(turns))
        bound = self._inference.bind(requested_mix(asked), asked.get("min_generation", 0))
        request = GenerateRequest(ids, None, options, request_id)
        (generation,) = await accept(self._inference, [request], bound)
        choice = _Choice(
            self._logprobs if logprobs else None, token_ids=asked.get("return_token_ids", False)
        )
        return Answer(
            "chat.completion",
            "chat.completion.chunk",
            "chatcmpl",
            asked,
            request_id,
            bound,
            [Row(choice, len(ids), generation)],
        )


class _Choice:
    """An answer, whose first part says who speaks."""

    def __init__(self, logprobs: ChatLogprobs | None, *, token_ids: bool) -> None:
        """Write chunks."""
        self._logprobs = logprobs
        self._token_ids = token_ids
        self._role: Mapping[str, str] = {"role": "assistant"}

    def part(self, chunk: Chunk) -> dict[str, Any]:
        """See `Choice`."""
        role, self._role = self._role, {}
        return {"delta": {**role, "content": chunk.text}, **self._rest(chunk)}

    def whole(self, chunk: Chunk) -> dict[str, Any]:
        """See `Choice`."""
        message = {**self._role, "content": chunk.text, "refusal": None}
        return {"message": message, **self._rest(chunk)}

    def _rest(self, chunk: Chunk) -> dict[str, Any]:
        written = self._logprobs and self._logprobs.write(
            chunk.token_ids, chunk.logprobs, chunk.top_logprobs
        )
        rest = {"logprobs": written, "finish_reason": FINISH_REASONS[chunk.finish_reason]}
        return {**rest, "token_ids": chunk.token_ids} if self._token_ids else rest

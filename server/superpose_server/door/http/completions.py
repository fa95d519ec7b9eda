"""`/v1/completions`: texts that go on from prompts."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from itertools import zip_longest
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from superpose_server.control.default_mix import MixState
from superpose_server.door.http.connection import while_connected
from superpose_server.door.http.endpoint import Endpoint
from superpose_server.door.http.fields import (
    COUNT,
    FLAG,
    TEXT,
    TOKEN_IDS,
    Asked,
    Field,
    Form,
    only,
    refuse,
)
from superpose_server.door.http.logprobs import TextLogprobs
from superpose_server.door.http.mix import MIN_GENERATION, MIX, MODEL, requested_mix
from superpose_server.door.http.replies import COMPLETION, COMPLETION_EVENT
from superpose_server.door.http.sampling import (
    GENERATION,
    http_names,
    max_tokens,
    sampling_params,
    wants_usage,
)
from superpose_server.door.http.texts import FINISH_REASONS, Answer, Row, accept, let_go
from superpose_server.engine.sequence import Chunk
from superpose_server.engine.token_bytes import TokenBytes
from superpose_server.errors import InvalidArgument
from superpose_server.inference.inference import Inference
from superpose_server.inference.request import GenerateRequest, ScoreRequest
from superpose_server.inference.result import ItemScore
from superpose_server.runtime import Runtime

Prompt = str | list[int]


class _Prompts:
    """A prompt or a list of them, each a text or a list of token ids."""

    schema: Mapping[str, Any] = {
        "anyOf": [
            TEXT.schema,
            {"type": "array", "items": TEXT.schema},
            TOKEN_IDS.schema,
            {"type": "array", "items": TOKEN_IDS.schema},
        ]
    }

    def read(self, value: Any, at: str) -> list[Prompt]:
        several = isinstance(value, list) and not (value and type(value[0]) is int)
        prompts = value if several else [value]
        for index, prompt in enumerate(prompts):
            if isinstance(prompt, list):
                TOKEN_IDS.read(prompt, f"{at}[{index}]" if several else at)
            elif not isinstance(prompt, str):
                refuse(prompt, at, "a text, a list of token ids, or a list of either")
        return list(prompts)


FORM = Form(
    "CompletionRequest",
    (
        MODEL,
        MIX,
        MIN_GENERATION,
        Field(
            "prompt",
            _Prompts(),
            "A text or token ids, or a list of either: a choice each, all run at once.",
            required=True,
        ),
        Field("echo", FLAG, "Begin the text with its prompt; with logprobs, score it too."),
        Field(
            "logprobs",
            COUNT,
            "The log-probability of each token, and of so many of the likeliest (at most 20), of "
            "the model's own distribution.",
        ),
        *GENERATION,
        *only({"best_of": [1], "suffix": [""]}),
    ),
)


class Completions:
    """Texts from the inference layer."""

    def __init__(self, runtime: Runtime, inference: Inference, token_bytes: TokenBytes) -> None:
        """Serve from these."""
        self._runtime = runtime
        self._inference = inference
        self._bytes = token_bytes
        # More could never be accepted at once, however often they are sent.
        self._most = min(
            runtime.limits.max_score_items,
            runtime.base.max_batch + runtime.config.max_queue,
        )

    def endpoints(self) -> tuple[Endpoint, ...]:
        """Return what is served."""
        return (
            Endpoint(
                "POST",
                "/v1/completions",
                self.complete,
                "Go on with texts.",
                form=FORM,
                reply=COMPLETION,
                events=COMPLETION_EVENT,
            ),
        )

    async def complete(self, request: Request, asked: Asked) -> Response:
        """Answer with a choice a prompt.

        Raises:
            ClientDisconnect: Nobody waits for it any more.
            ServerError: The request is wrong, or cannot be run.
        """
        with http_names(top_logprobs="logprobs"):
            answer = await while_connected(
                request.receive, self._accept(asked, request.state.request_id)
            )
        return await answer.respond(request)

    async def _accept(self, asked: Asked, request_id: str) -> Answer:
        wants_usage(asked)
        prompts: list[Prompt] = asked["prompt"]
        if not 1 <= len(prompts) <= self._most:
            raise InvalidArgument(
                f"prompt has {len(prompts)} texts: send 1 to {self._most}",
                "BAD_ITEM_COUNT",
                field="prompt",
            )
        top, most = asked.get("logprobs"), max_tokens(asked)
        options = sampling_params(
            asked,
            max_new_tokens=most or (None if most is None else 1),
            logprobs=top is not None,
            top_logprobs=top or 0,
        )
        ids = [await self._inference.encode(prompt) for prompt in prompts]
        bound = self._inference.bind(requested_mix(asked), asked.get("min_generation", 0))
        requests = [GenerateRequest(each, None, options, request_id) for each in ids]
        generations = [] if most == 0 else await accept(self._inference, requests, bound)
        try:
            choices = await self._choices(asked, prompts, ids, bound)
        except BaseException:
            let_go(generations)
            raise
        rows = [
            Row(choice, len(each), generation)
            for choice, each, generation in zip_longest(choices, ids, generations)
        ]
        return Answer("text_completion", "text_completion", "cmpl", asked, request_id, bound, rows)

    async def _choices(
        self, asked: Asked, prompts: list[Prompt], ids: list[list[int]], bound: MixState
    ) -> list[_Choice]:
        echo, top = asked.get("echo", False), asked.get("logprobs")
        if not echo:
            return [self._choice(asked, "", each) for each in ids]
        scores: Sequence[ItemScore | None] = [None] * len(ids)
        if top is not None:
            request = ScoreRequest(tuple(ids), top_logprobs=top)
            [scored] = await self._inference.score(request, bound)
            scores = scored.items

        def echoing() -> list[_Choice]:
            decode = self._runtime.tokenizer.decode
            return [
                self._choice(
                    asked, prompt if isinstance(prompt, str) else decode(each), each, score
                )
                for prompt, each, score in zip(prompts, ids, scores, strict=True)
            ]

        # Beside the event loop, since a long prompt that comes back is written token by token.
        return await asyncio.to_thread(echoing)

    def _choice(
        self, asked: Asked, echo: str, ids: list[int], score: ItemScore | None = None
    ) -> _Choice:
        logprobs = None
        if "logprobs" in asked:
            before = () if asked.get("echo", False) else ids
            logprobs = TextLogprobs(self._bytes, self._runtime.tokenizer, before)
        choice = _Choice(echo, logprobs, token_ids=asked.get("return_token_ids", False))
        if score is not None:
            choice.begin(ids, score)
        return choice


class _Choice:
    """A row of text; an echoed prompt comes with its first chunk."""

    def __init__(self, echo: str, logprobs: TextLogprobs | None, *, token_ids: bool) -> None:
        """Write chunks, behind `echo`."""
        self._echo = echo
        self._logprobs = logprobs
        self._begun: dict[str, list[Any]] = {}
        self._token_ids = token_ids

    def begin(self, ids: list[int], score: ItemScore) -> None:
        """Put the log-probabilities of the prompt in front; nothing foretells its first token."""
        assert self._logprobs is not None
        self._begun = self._logprobs.write(
            ids, (None, *score.logprobs), (None, *score.top_logprobs)
        )

    def part(self, chunk: Chunk) -> dict[str, Any]:
        """See `Choice`."""
        members: dict[str, Any] = {
            "text": self._echo + chunk.text,
            "logprobs": self._write(chunk),
            "finish_reason": FINISH_REASONS[chunk.finish_reason],
        }
        self._echo = ""
        if self._token_ids:
            members["token_ids"] = chunk.token_ids
        return members

    def whole(self, chunk: Chunk) -> dict[str, Any]:
        """See `Choice`."""
        return self.part(chunk)

    def _write(self, chunk: Chunk) -> dict[str, list[Any]] | None:
        if self._logprobs is None:
            return None
        written = self._logprobs.write(chunk.token_ids, chunk.logprobs, chunk.top_logprobs)
        begun, self._begun = self._begun, {}
        return {name: begun.get(name, []) + values for name, values in written.items()}

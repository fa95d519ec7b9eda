"""What texts and conversations have in common on their way out: rows, events, usage, headers."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, AsyncIterator, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from starlette.requests import Request
from starlette.responses import Response

from superpose_server.control.default_mix import MixState
from superpose_server.door.http.connection import while_connected
from superpose_server.door.http.event_stream import EventStream, event
from superpose_server.door.http.fields import Asked
from superpose_server.door.http.json_text import to_json
from superpose_server.door.http.mix import DEFAULT
from superpose_server.door.http.sampling import wants_usage
from superpose_server.engine.sequence import Chunk, FinishReason
from superpose_server.inference.generation import Generation
from superpose_server.inference.inference import Inference
from superpose_server.inference.request import GenerateRequest

FINISH_REASONS = {
    None: None,
    FinishReason.STOP: "stop",
    FinishReason.LENGTH: "length",
    FinishReason.ABORTED: "abort",
}
"""OpenAI's words, and vLLM's for a text that the server ended."""


class Choice(Protocol):
    """How the chunks of one row are written."""

    def part(self, chunk: Chunk) -> dict[str, Any]:
        """Return the members of a choice for the next chunk of a stream."""

    def whole(self, chunk: Chunk) -> dict[str, Any]:
        """Return them for all of a text."""


@dataclass(frozen=True)
class Row:
    """One prompt of a request; `generation` is None if no tokens are asked for behind it."""

    choice: Choice
    prompt_tokens: int
    generation: Generation | None

    async def chunks(self) -> AsyncIterator[Chunk]:
        """Return what is made, as it is made."""
        if self.generation is None:
            yield Chunk(finish_reason=FinishReason.LENGTH)
            return
        async for chunk in self.generation:
            yield chunk

    async def whole(self) -> Chunk:
        """Return all that is made."""
        if self.generation is None:
            return Chunk(finish_reason=FinishReason.LENGTH)
        return await self.generation.whole()


@dataclass(frozen=True)
class Answer:
    """All rows of a request, under one mix.

    Attributes:
        kind: `object` of a whole answer.
        kind_of_part: The same of an event.
        prefix: What its id begins with.
    """

    kind: str
    kind_of_part: str
    prefix: str
    asked: Asked
    request_id: str
    mix: MixState
    rows: Sequence[Row]
    created: int = field(default_factory=lambda: int(time.time()))

    async def respond(self, request: Request) -> Response:
        """Return the answer, whole or as a stream.

        Raises:
            ClientDisconnect: Nobody waits for it any more.
            ServerError: What went wrong with a row.
        """
        if not self.asked.get("stream", False):
            whole = await while_connected(request.receive, self._whole())
            return Response(whole, headers=mix_headers(self.mix), media_type="application/json")
        return EventStream(
            [self._events(index, row) for index, row in enumerate(self.rows)],
            mix_headers(self.mix),
            last=self._last,
            let_go=self.let_go,
        )

    def let_go(self) -> None:
        """Let every row leave at the next step."""
        let_go(row.generation for row in self.rows if row.generation is not None)

    async def _whole(self) -> str:
        try:
            chunks = await asyncio.gather(*(row.whole() for row in self.rows))
        finally:
            self.let_go()
        choices = [
            {"index": index, **row.choice.whole(chunk)}
            for index, (row, chunk) in enumerate(zip(self.rows, chunks, strict=True))
        ]
        return to_json({**self._envelope(self.kind), "choices": choices, "usage": self._usage()})

    async def _events(self, index: int, row: Row) -> AsyncGenerator[bytes]:
        # All but the choice is the same in every event, and is written once.
        envelope = to_json(self._envelope(self.kind_of_part))
        head = f'data: {envelope[:-1]},"choices":[{{"index":{index},'.encode()
        tail = b'],"usage":null}\n\n' if wants_usage(self.asked) else b"]}\n\n"
        always = wants_usage(self.asked) and self.asked["stream_options"].get(
            "continuous_usage_stats", False
        )
        async for chunk in row.chunks():
            if always:
                tail = f'],"usage":{to_json(self._usage())}}}\n\n'.encode()
            yield head + to_json(row.choice.part(chunk))[1:].encode() + tail

    def _last(self) -> bytes:
        end = event("[DONE]")
        if not wants_usage(self.asked):
            return end
        usage = {**self._envelope(self.kind_of_part), "choices": [], "usage": self._usage()}
        return event(to_json(usage)) + end

    def _envelope(self, kind: str) -> dict[str, Any]:
        return {
            "id": f"{self.prefix}-{self.request_id}",
            "object": kind,
            "created": self.created,
            "model": self.asked.get("model", DEFAULT),
            "system_fingerprint": self.mix.mix.digest,
        }

    def _usage(self) -> dict[str, int]:
        prompt = sum(row.prompt_tokens for row in self.rows)
        made = sum(row.generation.completion_tokens for row in self.rows if row.generation)
        return {
            "prompt_tokens": prompt,
            "completion_tokens": made,
            "total_tokens": prompt + made,
        }


async def accept(
    inference: Inference, requests: Sequence[GenerateRequest], bound: MixState
) -> list[Generation]:
    """Give all of several requests to the engine, or none.

    Raises:
        ServerError: As `Inference.generate`.
    """
    generations: list[Generation] = []
    try:
        for request in requests:
            generations.append(await inference.generate(request, bound))
    except BaseException:
        let_go(generations)
        raise
    return generations


def let_go(generations: Iterable[Generation]) -> None:
    """Let rows leave at the next step; to those that have ended this says nothing."""
    for generation in generations:
        generation.cancel()


def mix_headers(mix: MixState) -> Mapping[str, str]:
    """Return the headers that say which mix an answer was made with."""
    return {
        "x-superpose-mix-digest": mix.mix.digest,
        "x-superpose-generation": str(mix.generation),
    }

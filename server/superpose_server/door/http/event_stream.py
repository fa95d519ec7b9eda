"""Server-sent events, as bytes."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from superpose_server.door.http.connection import while_connected
from superpose_server.door.http.json_text import to_json
from superpose_server.door.http.status import to_answer

_HEADERS = {
    "content-type": "text/event-stream; charset=utf-8",
    "cache-control": "no-cache",
    # A proxy that collects an answer before it passes it on would make a stream pointless.
    "x-accel-buffering": "no",
}


def event(data: str, id: int | None = None) -> bytes:
    """Return an event that holds `data`, one line; `id` is what a client saw last."""
    head = "" if id is None else f"id: {id}\n"
    return f"{head}data: {data}\n\n".encode()


class EventStream(Response):
    """Sends what several sources make as they make it, then a last thing, and ends.

    A client that reads slowly holds up the sources, and nobody else. If a source raises, its error
    is the last event. When nothing more is sent, because of whatever, the sources are closed.
    """

    def __init__(
        self,
        sources: Sequence[AsyncGenerator[bytes]],
        headers: Mapping[str, str] | None = None,
        *,
        first: bytes = b"",
        last: Callable[[], bytes] = bytes,
        let_go: Callable[[], None] = lambda: None,
    ) -> None:
        """Send `sources`.

        Args:
            sources: Each yields one or more whole events at a time.
            headers: Of the answer, beside those of every stream.
            first: What comes before all of them: what a source had to yield before there could be
                a stream, since until then an error is an answer with a status of its own.
            last: Returns what comes behind all of them.
            let_go: Called once the sources are closed.
        """
        self.status_code = 200
        self.background = None
        self.init_headers({**(headers or {}), **_HEADERS})
        self._sources = sources
        self._first = first
        self._last = last
        self._let_go = let_go

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send everything.

        Raises:
            ClientDisconnect: Nobody reads any more.
            Exception: What a source raised, once it is told.
        """
        try:
            await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
            await while_connected(receive, self._send_all(send))
        finally:
            for source in self._sources:
                await source.aclose()
            self._let_go()

    async def _send_all(self, send: Send) -> None:
        if self._first:
            await _send_bytes(send, self._first, more=True)
        try:
            async with asyncio.TaskGroup() as group:
                for source in self._sources:
                    group.create_task(_send(source, send))
        except ExceptionGroup as errors:
            _, body, _ = to_answer(error := errors.exceptions[0])
            await _send_bytes(send, event(to_json(body)), more=False)
            raise error from None
        await _send_bytes(send, self._last(), more=False)


async def _send(source: AsyncGenerator[bytes], send: Send) -> None:
    async for events in source:
        await _send_bytes(send, events, more=True)


async def _send_bytes(send: Send, body: bytes, *, more: bool) -> None:
    await send({"type": "http.response.body", "body": body, "more_body": more})

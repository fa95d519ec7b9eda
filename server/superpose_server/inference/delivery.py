"""Chunks on their way from the engine thread to the requests that wait on the event loop.

The engine hands out a step's chunks one right after the other. The loop is woken once for all of
them, and what a request has not taken when more arrives is taken together with it: a request that
takes slowly is sent fewer and longer responses, and costs nobody anything in the meantime.

A response costs the loop far more than the model's next token may cost the engine, and the two
share the interpreter. So after it has let some requests go on, the loop leaves them a while
before it lets any go on again: with many streams and quick steps, responses of several tokens take
the place of a loop that is never idle.
"""

from __future__ import annotations

import asyncio
import threading
from itertools import chain

from superpose_server.engine.sequence import Chunk

# Seconds until the next requests may go on, for each that just has: about three times what sending
# a response costs the loop, so that the engine has most of the interpreter.
_REST = 2e-4


class Delivery:
    """Lets the requests of one event loop go on when the engine has something for them."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        """Deliver to requests that run on `loop`."""
        self._loop = loop
        self._lock = threading.Lock()
        self._due: list[asyncio.Future[None]] = []
        self._rested = 0.0

    def inbox(self) -> Inbox:
        """Return a place for one row's chunks."""
        return Inbox(self)

    def _call(self, waiter: asyncio.Future[None]) -> bool:
        """Let a request go on soon; returns whether the loop must be woken for it."""
        self._due.append(waiter)
        return len(self._due) == 1  # Else it was woken, and has not come yet.

    def _wake(self) -> None:
        if not self._loop.is_closed():  # As it is after the server's end.
            self._loop.call_soon_threadsafe(self._flush)

    def _flush(self) -> None:
        now = self._loop.time()
        if now < self._rested:
            self._loop.call_at(self._rested, self._flush)
            return
        with self._lock:
            due, self._due = self._due, []
        self._rested = now + _REST * len(due)
        for waiter in due:
            if not waiter.done():  # Cancelled with its request.
                waiter.set_result(None)


class Inbox:
    """What one row has made and its request has not taken: at most all that the row may make."""

    def __init__(self, delivery: Delivery) -> None:
        """Begin empty; see `Delivery.inbox`."""
        self._delivery = delivery
        self._whole = False
        self._chunks: list[Chunk] = []
        self._waiter: asyncio.Future[None] | None = None

    def put(self, chunk: Chunk) -> None:
        """Add a chunk, as the row's sink: on the engine thread, in order, and without waiting."""
        delivery = self._delivery
        with delivery._lock:
            self._chunks.append(chunk)
            waiter = self._waiter
            if waiter is None or not self._ready():
                return
            self._waiter = None
            wake = delivery._call(waiter)
        if wake:
            delivery._wake()

    async def take(self, *, whole: bool = False) -> Chunk:
        """Wait for chunks, and return all that there are as one; with `whole` wait for the last."""
        delivery = self._delivery
        with delivery._lock:
            self._whole = whole
            waiter = None if self._ready() else delivery._loop.create_future()
            self._waiter = waiter
        if waiter is not None:
            await waiter
        with delivery._lock:
            chunks, self._chunks = self._chunks, []
        return _joined(chunks)

    def _ready(self) -> bool:
        return bool(self._chunks) and (not self._whole or self._chunks[-1].last)


def _joined(chunks: list[Chunk]) -> Chunk:
    if len(chunks) == 1:
        return chunks[0]
    return Chunk(
        "".join(chunk.text for chunk in chunks),
        tuple(chain.from_iterable(chunk.token_ids for chunk in chunks)),
        tuple(chain.from_iterable(chunk.logprobs for chunk in chunks)),
        chunks[-1].finish_reason,
        chunks[-1].error,
        tuple(chain.from_iterable(chunk.top_logprobs for chunk in chunks)),
    )

"""A request that runs, as its door sees it."""

from __future__ import annotations

from collections.abc import AsyncGenerator

from superpose_server.control.default_mix import MixState
from superpose_server.engine.sequence import Chunk, Sequence
from superpose_server.inference.delivery import Inbox


class Generation:
    """Iterate over it for chunks as they are made, or await `whole` for all of them as one.

    Who stops reading lets go of the row. `cancel` does so for a reader that hangs elsewhere.

    Attributes:
        request_id: As sent, or as made.
        mix: What the request was bound to when it was accepted.
        prompt_tokens: Number of tokens of the prompt.
        completion_tokens: Number of tokens read so far.
    """

    def __init__(self, request_id: str, mix: MixState, row: Sequence, inbox: Inbox) -> None:
        """Read `inbox`, where the chunks of `row` arrive."""
        self.request_id = request_id
        self.mix = mix
        self.prompt_tokens = len(row.prompt)
        self.completion_tokens = 0
        self._row = row
        self._inbox = inbox

    def cancel(self) -> None:
        """Let the row leave at the next step; to a row that has ended this says nothing new."""
        self._row.cancel()

    async def __aiter__(self) -> AsyncGenerator[Chunk]:
        """Return chunks as they are made, and then raise what went wrong, if anything did."""
        chunk = Chunk()
        try:
            while not chunk.last:
                chunk = await self._take(whole=False)
                if chunk.error is None or chunk.token_ids:
                    yield chunk
        finally:
            self.cancel()
        if chunk.error is not None:
            raise chunk.error

    async def whole(self) -> Chunk:
        """Return all of the text at its end, or raise what went wrong."""
        try:
            chunk = await self._take(whole=True)
        finally:
            self.cancel()
        if chunk.error is not None:
            raise chunk.error
        return chunk

    async def _take(self, *, whole: bool) -> Chunk:
        chunk = await self._inbox.take(whole=whole)
        self.completion_tokens += len(chunk.token_ids)
        return chunk

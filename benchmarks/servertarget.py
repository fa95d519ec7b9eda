"""A server behind a socket as something that can be put under load, through the client library."""

from __future__ import annotations

from benchmarks.target import Streamed, Weights
from superpose_client import AsyncClient, CallError, GenerateOptions


class ServerTarget:
    """A server, through the client library."""

    def __init__(self, client: AsyncClient) -> None:
        """Send through `client`."""
        self._client = client

    async def stream(self, request: Streamed) -> None:
        """Run a request; a failed call is an outcome, not an exception."""
        mix = None if request.mix is None else dict(request.mix)
        options: GenerateOptions = {
            **request.sampling,
            "max_new_tokens": request.length,
            "ignore_eos": True,
        }
        try:
            stream = self._client.stream(list(request.prompt), mix=mix, **options)
            async for chunk in stream:
                request.add(chunk.token_ids)
                if chunk.mix is not None:
                    request.used = chunk.mix.weights
        except CallError as error:
            request.end(error.code.name)
        else:
            request.end("OK")

    async def change(self, mix: Weights) -> str:
        """Change the default mix."""
        try:
            await self._client.set(dict(mix))
        except CallError as error:
            return error.code.name
        return "OK"

    async def generation(self) -> int:
        """Return the generation of the default mix."""
        return (await self._client.mix()).generation

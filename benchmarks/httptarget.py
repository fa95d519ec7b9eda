"""The HTTP door as something that can be put under load, by a client that costs little."""

from __future__ import annotations

import asyncio
import json

from benchmarks.target import Streamed
from superpose_client.mix import format_mix

_EVENT = b"data: "
_END = b"data: [DONE]"


class HttpTarget:
    """Streams of `/v1/completions`, each over a connection of its own.

    The server writes an event as one chunk, so that events are the lines that begin as such, and
    nothing else of HTTP has to be read.
    """

    def __init__(self, address: str) -> None:
        """Send to HOST:PORT."""
        self._address = address
        self._host, _, self._port = address.rpartition(":")

    async def stream(self, request: Streamed) -> None:
        """Run a request; a status other than 200 is an outcome, not an exception."""
        body = json.dumps(
            {
                "prompt": list(request.prompt),
                "model": "default" if request.mix is None else format_mix(request.mix),
                "max_tokens": request.length,
                "ignore_eos": True,
                "stream": True,
                "return_token_ids": True,
                **request.sampling,
            }
        ).encode()
        reader, writer = await asyncio.open_connection(self._host, int(self._port))
        try:
            writer.write(
                b"POST /v1/completions HTTP/1.1\r\nHost: %b\r\nConnection: close\r\n"
                b"Content-Type: application/json\r\nContent-Length: %d\r\n\r\n%b"
                % (self._address.encode(), len(body), body)
            )
            status = (await reader.readline()).split()[1].decode()
            if status != "200":
                request.end(status)
                return
            async for line in reader:
                if line.startswith(_END):
                    request.end("OK")
                    return
                if line.startswith(_EVENT):
                    event = json.loads(line.removeprefix(_EVENT))
                    request.add(event["choices"][0]["token_ids"])
            request.end("BROKEN_OFF")
        finally:
            writer.close()

"""Both clients behind one face, so that every test of the calls runs against each."""

import asyncio
import threading
from typing import Any, Protocol

from superpose_client.async_client import AsyncClient
from superpose_client.client import Client


class Caller(Protocol):
    """The methods of `Client`, and what differs between the two."""

    def __getattr__(self, name: str) -> Any:
        """A call, which returns its result."""

    def collect(self, method: str, *arguments: Any, **options: Any) -> list[Any]:
        """All results of a stream."""

    def leave_loop(self, left: threading.Event, method: str, *arguments: Any) -> bool:
        """Whether `left` is set after a stream's loop is left; the stream stays referenced."""

    def close(self) -> None:
        """Close the client."""


class SyncCaller:
    def __init__(self, address: str, **options: Any) -> None:
        self._client = Client(address, **options)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._client, name)

    def collect(self, method: str, *arguments: Any, **options: Any) -> list[Any]:
        return list(getattr(self._client, method)(*arguments, **options))

    def leave_loop(self, left: threading.Event, method: str, *arguments: Any) -> bool:
        stream = getattr(self._client, method)(*arguments)
        for _ in stream:
            break
        return left.wait(10)

    def close(self) -> None:
        self._client.close()


class AsyncCaller:
    def __init__(self, address: str, **options: Any) -> None:
        self._runner = asyncio.Runner()

        async def connect() -> AsyncClient:
            return AsyncClient(address, **options)

        self._client = self._runner.run(connect())

    def __getattr__(self, name: str) -> Any:
        def call(*arguments: Any, **options: Any) -> Any:
            return self._runner.run(getattr(self._client, name)(*arguments, **options))

        return call

    def collect(self, method: str, *arguments: Any, **options: Any) -> list[Any]:
        async def run() -> list[Any]:
            return [r async for r in getattr(self._client, method)(*arguments, **options)]

        return self._runner.run(run())

    def leave_loop(self, left: threading.Event, method: str, *arguments: Any) -> bool:
        async def run() -> bool:
            stream = getattr(self._client, method)(*arguments)
            async for _ in stream:
                break
            return await asyncio.to_thread(left.wait, 10)

        return self._runner.run(run())

    def close(self) -> None:
        self._runner.run(self._client.close())
        self._runner.close()

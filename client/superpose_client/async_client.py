"""The client for asyncio: the calls of `Client`, awaited."""

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from contextlib import contextmanager, suppress
from types import TracebackType
from typing import Any, Concatenate, Generic, ParamSpec, Self, TypeVar, Unpack

import grpc
import grpc.aio

from superpose_client import calls
from superpose_client.access import Access
from superpose_client.attempts import Attempts
from superpose_client.call import Call, Calls, as_method_of
from superpose_client.channel import OfOneProcess
from superpose_client.connection import DEFAULT_TARGET, RETRIES, Connections, Target
from superpose_client.errors import CallError, RequestCancelledError

P = ParamSpec("P")
R = TypeVar("R")


@contextmanager
def _cancellation_told_apart(what: str) -> Iterator[None]:
    try:
        yield
    except asyncio.CancelledError:
        # gRPC raises this for a cancelled call too, but here it must mean the task.
        task = asyncio.current_task()
        if task is None or task.cancelling():
            raise
        raise RequestCancelledError(f"{what} was cancelled") from None


class AsyncStream(OfOneProcess, Generic[R]):
    """The results of a streaming call. Leaving the loop, or the `with` block, cancels the call."""

    def __init__(self, connections: Connections, call: Call[R]) -> None:
        """Begin a call."""
        self._attempts = Attempts(connections, call)
        self._cancelled = asyncio.Event()
        self._convert = call.convert
        self._start()

    def _start(self) -> None:
        self._call = self._attempts.start()
        self._messages = aiter(self._call)

    async def __anext__(self) -> R:
        """Wait for the next result."""
        while True:
            try:
                with _cancellation_told_apart("the stream"):
                    message = await anext(self._messages)
            except grpc.RpcError as error:
                pause = self._attempts.pause_after(error)
            else:
                self._attempts.answered()
                return self._convert(message)
            with suppress(TimeoutError):
                async with asyncio.timeout(pause):
                    await self._cancelled.wait()
            if self._cancelled.is_set():
                raise RequestCancelledError("the stream was cancelled")
            self._start()

    async def __aiter__(self) -> AsyncIterator[R]:
        """Yield the results that are left."""
        # A generator, because it is closed soon after the loop that runs it is left, even where
        # the caller still holds the stream.
        try:
            while True:
                try:
                    result = await anext(self)
                except StopAsyncIteration:
                    return
                yield result
        finally:
            self.cancel()

    def cancel(self) -> None:
        """End the call; the server stops its work. Harmless after the end."""
        self._cancelled.set()
        self._call.cancel()

    async def __aenter__(self) -> Self:
        """Return the stream."""
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Cancel."""
        self.cancel()


# Every call is written once, in `calls`; these make a method of it.


def _method(
    make: Callable[P, Call[R] | Calls[R]],
) -> Callable[Concatenate["AsyncClient", P], Coroutine[Any, Any, R]]:
    async def method(client: "AsyncClient", /, *arguments: P.args, **options: P.kwargs) -> R:
        running = iter(make(*arguments, **options))
        try:
            call = next(running)
            while True:
                try:
                    result = await client._run(call)
                except CallError as error:
                    call = running.throw(error)
                else:
                    call = running.send(result)
        except StopIteration as end:
            returned: R = end.value
            return returned

    return as_method_of(make, method)


def _stream(
    make: Callable[P, Call[R]],
) -> Callable[Concatenate["AsyncClient", P], AsyncStream[R]]:
    def method(client: "AsyncClient", /, *arguments: P.args, **options: P.kwargs) -> AsyncStream[R]:
        return AsyncStream(client._connections, make(*arguments, **options))

    return as_method_of(make, method, AsyncStream)


class AsyncClient(OfOneProcess):
    """A connection to a Superpose server, or to several, for one event loop.

        async with AsyncClient() as client:
            async for chunk in client.stream("Question: What is 2 + 3?", mix="math"):
                print(chunk.text, end="", flush=True)

    Make it inside a coroutine. A `mix`, a `timeout`, all options and the errors are those of
    `Client`.
    """

    def __init__(
        self,
        target: Target = DEFAULT_TARGET,
        *,
        timeout: float | None = None,
        retries: int = RETRIES,
        **access: Unpack[Access],
    ) -> None:
        """Prepare the connection; the first call makes it.

        Raises:
            AddressError: An address is empty.
            AccessError: A token, certificate or CA cannot be used, or the token would go out
                unencrypted.
            OSError: A file of theirs cannot be read.
        """
        self._connections = Connections(grpc.aio, target, timeout, retries, access)

    async def close(self) -> None:
        """Close the connection; running calls are cancelled."""
        for connection in self._connections.all:
            connection.closed = True
            for channel in connection.channels:
                await channel.close(None)

    async def __aenter__(self) -> Self:
        """Return the client."""
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Close."""
        await self.close()

    # Text under a mix.
    generate = _method(calls.generate)
    stream = _stream(calls.stream)
    score = _method(calls.score)
    fit = _stream(calls.fit)

    # The default mix.
    add = _method(calls.add)
    remove = _method(calls.remove)
    set = _method(calls.set)
    mix = _method(calls.mix)
    watch = _stream(calls.watch)
    analyze = _method(calls.analyze)
    verify = _method(calls.verify)

    # Named mixes.
    name_mix = _method(calls.name_mix)
    unname_mix = _method(calls.unname_mix)
    named_mixes = _method(calls.named_mixes)

    # Adapters.
    adapters = _method(calls.adapters)
    adapter = _method(calls.adapter)
    push = _method(calls.push)
    merge = _method(calls.merge)
    delete = _method(calls.delete)

    # The server.
    info = _method(calls.info)
    changes = _method(calls.changes)
    health = _method(calls.health)

    async def _run(self, call: Call[R]) -> R:
        attempts = Attempts(self._connections, call)
        while True:
            try:
                with _cancellation_told_apart("the call"):
                    response = await attempts.start()
            except grpc.RpcError as error:
                pause = attempts.pause_after(error)
            else:
                return call.convert(response)
            await asyncio.sleep(pause)

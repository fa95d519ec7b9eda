"""The client for threads. `async_client` has the same calls for asyncio."""

import threading
import time
from collections.abc import Callable, Iterator
from types import TracebackType
from typing import Concatenate, Generic, ParamSpec, Self, TypeVar, Unpack

import grpc

from superpose_client import calls
from superpose_client.access import Access
from superpose_client.attempts import Attempts
from superpose_client.call import Call, Calls, as_method_of
from superpose_client.channel import OfOneProcess
from superpose_client.connection import DEFAULT_TARGET, RETRIES, Connections, Target
from superpose_client.errors import CallError, RequestCancelledError

P = ParamSpec("P")
R = TypeVar("R")


class Stream(OfOneProcess, Generic[R]):
    """The results of a streaming call. Leaving the loop, or the `with` block, cancels the call."""

    def __init__(self, connections: Connections, call: Call[R]) -> None:
        """Begin a call."""
        self._attempts = Attempts(connections, call)
        self._cancelled = threading.Event()
        self._call = self._attempts.start()
        self._convert = call.convert

    def __next__(self) -> R:
        """Wait for the next result."""
        while True:
            try:
                message = next(self._call)
            except grpc.RpcError as error:
                # A call that was cancelled needs no pause, and ends the same in one and before it.
                pause = 0.0 if self._cancelled.is_set() else self._attempts.pause_after(error)
            except StopIteration:
                raise
            except BaseException:
                self._attempts.interrupted()
                raise
            else:
                self._attempts.answered()
                return self._convert(message)
            if self._cancelled.wait(pause):
                raise RequestCancelledError("the stream was cancelled")
            self._call = self._attempts.start()
            # In between it may have been the call before that was cancelled.
            if self._cancelled.is_set():
                self._call.cancel()

    def __iter__(self) -> Iterator[R]:
        """Yield the results that are left."""
        # A generator, because it is closed when the loop that runs it is left, even where the
        # caller still holds the stream.
        try:
            while True:
                try:
                    result = next(self)
                except StopIteration:
                    return
                yield result
        finally:
            self.cancel()

    def cancel(self) -> None:
        """End the call; the server stops its work. Harmless after the end."""
        self._cancelled.set()
        self._call.cancel()

    def __enter__(self) -> Self:
        """Return the stream."""
        return self

    def __exit__(
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
) -> Callable[Concatenate["Client", P], R]:
    def method(client: "Client", /, *arguments: P.args, **options: P.kwargs) -> R:
        running = iter(make(*arguments, **options))
        try:
            call = next(running)
            while True:
                try:
                    result = client._run(call)
                except CallError as error:
                    call = running.throw(error)
                else:
                    call = running.send(result)
        except StopIteration as end:
            returned: R = end.value
            return returned

    return as_method_of(make, method)


def _stream(make: Callable[P, Call[R]]) -> Callable[Concatenate["Client", P], Stream[R]]:
    def method(client: "Client", /, *arguments: P.args, **options: P.kwargs) -> Stream[R]:
        return Stream(client._connections, make(*arguments, **options))

    return as_method_of(make, method, Stream)


class Client(OfOneProcess):
    """A connection to a Superpose server, or to several; threads may share it.

        with Client() as client:
            client.add("math")
            print(client.generate("Question: What is 2 + 3?", temperature=0).text)

    A `mix` is MIX syntax or {name: weight}, the name a domain's or a named mix's; None or "default"
    is the default mix, {} or "base" the base model.
    A `timeout` is in seconds and math.inf means none; None is the client's own if it was given one,
    else 60 s, 600 s for calls that compute, and none for streams.
    A failed call raises an `errors.CallError`. Before that it is sent again, after a pause, at most
    `retries` times and within its timeout, if the server was not there or said how long to wait,
    and if the call changes nothing or has an `expected_generation`.
    Tokens, certificates and CAs are options too, explained by `Access`.
    With several addresses, a list or "host:1,host:2", `generate`, `stream`, `score` and `fit` go to
    each server in turn, and past those that are not there or do not serve. Every other call is
    about one server and needs a client of one address: servers do not tell each other of changes.
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
        self._connections = Connections(grpc, target, timeout, retries, access)

    def close(self) -> None:
        """Close the connection; running calls are cancelled."""
        for connection in self._connections.all:
            connection.closed = True
            for channel in connection.channels:
                channel.close()

    def __enter__(self) -> Self:
        """Return the client."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Close."""
        self.close()

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

    def _run(self, call: Call[R]) -> R:
        attempts = Attempts(self._connections, call)
        while True:
            try:
                response = attempts.start()
            except grpc.RpcError as error:
                time.sleep(attempts.pause_after(error))
            else:
                return call.convert(response)

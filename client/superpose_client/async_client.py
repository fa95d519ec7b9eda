"""The client for asyncio: the calls of `Client`, awaited."""

import asyncio
from collections.abc import AsyncIterator, Callable, Iterable
from os import PathLike
from types import TracebackType
from typing import Any, Generic, Self, TypeVar, Unpack

import grpc
import grpc.aio

from superpose_client import calls
from superpose_client.calls import CHANNEL_OPTIONS, DEFAULT_TARGET, Call, Stubs
from superpose_client.errors import RequestCancelledError, from_rpc_error
from superpose_client.mix import MixLike
from superpose_client.requests import (
    AdapterFiles,
    GenerateOptions,
    Prompt,
    Scope,
    ScoreBatches,
    ScoreText,
)
from superpose_client.results import (
    AdapterInfo,
    Analysis,
    CurrentMix,
    Generation,
    GenerationChunk,
    HealthStatus,
    MixState,
    PushResult,
    ScoreResult,
    ServerInfo,
    Verification,
)

R = TypeVar("R")


class AsyncStream(Generic[R]):
    """The results of a streaming call. Leaving the loop, or the `with` block, cancels the call."""

    def __init__(self, call: Any, convert: Callable[[Any], R]) -> None:
        """Wrap a call that has begun."""
        self._call = call
        self._messages = aiter(call)
        self._convert = convert

    async def __anext__(self) -> R:
        """Wait for the next result."""
        try:
            return self._convert(await anext(self._messages))
        except grpc.RpcError as error:
            raise from_rpc_error(error) from error
        except asyncio.CancelledError:
            # gRPC raises this for a cancelled call too, but here it must mean the task.
            task = asyncio.current_task()
            if task is None or task.cancelling():
                raise
            raise RequestCancelledError("the stream was cancelled") from None

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


class AsyncClient:
    """A connection to a Superpose server, for one event loop; make it inside a coroutine.

        async with AsyncClient() as client:
            async for chunk in client.stream("Question: What is 2 + 3?", mix="math"):
                print(chunk.text, end="", flush=True)

    A `mix`, a `timeout` and the errors are those of `Client`.
    """

    def __init__(self, target: str = DEFAULT_TARGET, *, timeout: float | None = None) -> None:
        """Prepare the connection; the first call makes it."""
        self._timeout = timeout
        self._channel = grpc.aio.insecure_channel(target, options=CHANNEL_OPTIONS)
        self._stubs = Stubs(self._channel)

    async def close(self) -> None:
        """Close the connection; running calls are cancelled."""
        await self._channel.close(None)

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

    async def generate(
        self,
        prompt: Prompt,
        *,
        mix: MixLike | None = None,
        request_id: str = "",
        timeout: float | None = None,
        **options: Unpack[GenerateOptions],
    ) -> Generation:
        """Return the text that follows the prompt. For the options see `GenerateOptions`."""
        return await self._run(calls.generate(prompt, mix, request_id, options), timeout)

    def stream(
        self,
        prompt: Prompt,
        *,
        mix: MixLike | None = None,
        request_id: str = "",
        timeout: float | None = None,
        **options: Unpack[GenerateOptions],
    ) -> AsyncStream[GenerationChunk]:
        """Begin to generate; the chunks come as the text is made."""
        return self._stream(calls.stream(prompt, mix, request_id, options), timeout)

    async def score(
        self,
        texts: Iterable[ScoreText],
        *,
        mix: MixLike | None = None,
        max_length: int | None = None,
        scope: Scope = "all",
        logprobs: bool = False,
        progress: Callable[[int], None] | None = None,
        timeout: float | None = None,
    ) -> ScoreResult:
        """Return log-probabilities and perplexity of texts or (question, answer) pairs.

        Any number of texts: they go out 256 at a time, each request with its own timeout and all
        under the mix of the first; `progress` is told how many are scored. The scope "answer",
        for pairs only, leaves the question's tokens out of the sums.

        Raises:
            MixChangedError: An adapter of the mix was replaced in between.
        """
        batches = ScoreBatches(texts, mix, max_length, scope, logprobs)
        for call in calls.score(batches):
            done = await self._run(call, timeout)
            if progress is not None:
                progress(done)
        return batches.result()

    # The default mix.

    async def add(
        self,
        domain: str,
        weight: float | None = None,
        *,
        expected_generation: int | None = None,
        timeout: float | None = None,
    ) -> MixState:
        """Add a domain to the default mix, with weight 1 unless another is given."""
        return await self._run(calls.add(domain, weight, expected_generation), timeout)

    async def remove(
        self,
        domain: str,
        *,
        expected_generation: int | None = None,
        timeout: float | None = None,
    ) -> MixState:
        """Remove a domain from the default mix."""
        return await self._run(calls.remove(domain, expected_generation), timeout)

    async def set(
        self,
        mix: MixLike,
        *,
        expected_generation: int | None = None,
        timeout: float | None = None,
    ) -> MixState:
        """Make `mix` the default mix. Setting what is set already changes nothing."""
        return await self._run(calls.set_mix(mix, expected_generation), timeout)

    async def mix(self, *, timeout: float | None = None) -> CurrentMix:
        """Return the default mix, with the resident one beside it."""
        return await self._run(calls.get_mix(), timeout)

    def watch(self, *, timeout: float | None = None) -> AsyncStream[MixState]:
        """Follow the default mix: its present state first, then one state a change."""
        return self._stream(calls.watch(), timeout)

    async def analyze(
        self, mix: MixLike | None = None, *, timeout: float | None = None
    ) -> Analysis:
        """Report how the domains of a mix interfere. Nothing is changed."""
        return await self._run(calls.analyze(mix), timeout)

    async def verify(self, *, timeout: float | None = None) -> Verification:
        """Compare the weights in use with what they should be. A mismatch is a result, `ok`."""
        return await self._run(calls.verify(), timeout)

    # Adapters.

    async def adapters(self, *, timeout: float | None = None) -> tuple[AdapterInfo, ...]:
        """Return all adapters, in order of their domains."""
        return await self._run(calls.adapters(), timeout)

    async def adapter(self, domain: str, *, timeout: float | None = None) -> AdapterInfo:
        """Return one adapter, with its modules and its configuration."""
        return await self._run(calls.adapter(domain), timeout)

    async def push(
        self,
        domain: str,
        adapter: str | PathLike[str] | AdapterFiles,
        *,
        replace: bool = False,
        timeout: float | None = None,
    ) -> PushResult:
        """Store an adapter, a PEFT folder or its two files, under a domain name.

        The same bytes again are fine; other bytes need `replace`.

        Raises:
            AdapterFolderError: The folder lacks a file, or holds a pickle.
        """
        return await self._run(calls.push(domain, adapter, replace), timeout)

    async def delete(self, domain: str, *, timeout: float | None = None) -> None:
        """Delete an adapter that is not in the default mix."""
        await self._run(calls.delete(domain), timeout)

    # The server.

    async def info(self, *, timeout: float | None = None) -> ServerInfo:
        """Return what the server is and what it is doing."""
        return await self._run(calls.info(), timeout)

    async def health(self, service: str = "", *, timeout: float | None = None) -> HealthStatus:
        """Return whether the server, or one of its services, takes requests."""
        return await self._run(calls.health(service), timeout)

    async def _run(self, call: Call[R], timeout: float | None) -> R:
        try:
            response = await self._stubs.start(call, self._timeout if timeout is None else timeout)
        except grpc.RpcError as error:
            raise from_rpc_error(error) from error
        return call.convert(response)

    def _stream(self, call: Call[R], timeout: float | None) -> AsyncStream[R]:
        running = self._stubs.start(call, self._timeout if timeout is None else timeout)
        return AsyncStream(running, call.convert)

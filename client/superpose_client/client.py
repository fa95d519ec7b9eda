"""The client for threads. `async_client` has the same calls for asyncio."""

from collections.abc import Callable, Iterable, Iterator
from os import PathLike
from types import TracebackType
from typing import Any, Generic, Self, TypeVar, Unpack

import grpc

from superpose_client import calls
from superpose_client.calls import CHANNEL_OPTIONS, DEFAULT_TARGET, Call, Stubs
from superpose_client.errors import from_rpc_error
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


class Stream(Generic[R]):
    """The results of a streaming call. Leaving the loop, or the `with` block, cancels the call."""

    def __init__(self, call: Any, convert: Callable[[Any], R]) -> None:
        """Wrap a call that has begun."""
        self._call = call
        self._convert = convert

    def __next__(self) -> R:
        """Wait for the next result."""
        try:
            return self._convert(next(self._call))
        except grpc.RpcError as error:
            raise from_rpc_error(error) from error

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


class Client:
    """A connection to a Superpose server; threads may share it.

        with Client() as client:
            client.add("math")
            print(client.generate("Question: What is 2 + 3?", temperature=0).text)

    A `mix` is MIX syntax or {domain: weight}; None is the default mix, "base" or {} the base model.
    A `timeout` is in seconds and math.inf means none; None is the client's own if it was given one,
    else 60 s, 600 s for calls that compute, and none for streams.
    A failed call raises an `errors.CallError`. Nothing is ever sent twice.
    """

    def __init__(self, target: str = DEFAULT_TARGET, *, timeout: float | None = None) -> None:
        """Prepare the connection; the first call makes it."""
        self._timeout = timeout
        self._channel = grpc.insecure_channel(target, options=CHANNEL_OPTIONS)
        self._stubs = Stubs(self._channel)

    def close(self) -> None:
        """Close the connection; running calls are cancelled."""
        self._channel.close()

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

    def generate(
        self,
        prompt: Prompt,
        *,
        mix: MixLike | None = None,
        request_id: str = "",
        timeout: float | None = None,
        **options: Unpack[GenerateOptions],
    ) -> Generation:
        """Return the text that follows the prompt. For the options see `GenerateOptions`."""
        return self._run(calls.generate(prompt, mix, request_id, options), timeout)

    def stream(
        self,
        prompt: Prompt,
        *,
        mix: MixLike | None = None,
        request_id: str = "",
        timeout: float | None = None,
        **options: Unpack[GenerateOptions],
    ) -> Stream[GenerationChunk]:
        """Begin to generate; the chunks come as the text is made."""
        return self._stream(calls.stream(prompt, mix, request_id, options), timeout)

    def score(
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
            done = self._run(call, timeout)
            if progress is not None:
                progress(done)
        return batches.result()

    # The default mix.

    def add(
        self,
        domain: str,
        weight: float | None = None,
        *,
        expected_generation: int | None = None,
        timeout: float | None = None,
    ) -> MixState:
        """Add a domain to the default mix, with weight 1 unless another is given."""
        return self._run(calls.add(domain, weight, expected_generation), timeout)

    def remove(
        self,
        domain: str,
        *,
        expected_generation: int | None = None,
        timeout: float | None = None,
    ) -> MixState:
        """Remove a domain from the default mix."""
        return self._run(calls.remove(domain, expected_generation), timeout)

    def set(
        self,
        mix: MixLike,
        *,
        expected_generation: int | None = None,
        timeout: float | None = None,
    ) -> MixState:
        """Make `mix` the default mix. Setting what is set already changes nothing."""
        return self._run(calls.set_mix(mix, expected_generation), timeout)

    def mix(self, *, timeout: float | None = None) -> CurrentMix:
        """Return the default mix, with the resident one beside it."""
        return self._run(calls.get_mix(), timeout)

    def watch(self, *, timeout: float | None = None) -> Stream[MixState]:
        """Follow the default mix: its present state first, then one state a change."""
        return self._stream(calls.watch(), timeout)

    def analyze(self, mix: MixLike | None = None, *, timeout: float | None = None) -> Analysis:
        """Report how the domains of a mix interfere. Nothing is changed."""
        return self._run(calls.analyze(mix), timeout)

    def verify(self, *, timeout: float | None = None) -> Verification:
        """Compare the weights in use with what they should be. A mismatch is a result, `ok`."""
        return self._run(calls.verify(), timeout)

    # Adapters.

    def adapters(self, *, timeout: float | None = None) -> tuple[AdapterInfo, ...]:
        """Return all adapters, in order of their domains."""
        return self._run(calls.adapters(), timeout)

    def adapter(self, domain: str, *, timeout: float | None = None) -> AdapterInfo:
        """Return one adapter, with its modules and its configuration."""
        return self._run(calls.adapter(domain), timeout)

    def push(
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
        return self._run(calls.push(domain, adapter, replace), timeout)

    def delete(self, domain: str, *, timeout: float | None = None) -> None:
        """Delete an adapter that is not in the default mix."""
        self._run(calls.delete(domain), timeout)

    # The server.

    def info(self, *, timeout: float | None = None) -> ServerInfo:
        """Return what the server is and what it is doing."""
        return self._run(calls.info(), timeout)

    def health(self, service: str = "", *, timeout: float | None = None) -> HealthStatus:
        """Return whether the server, or one of its services, takes requests."""
        return self._run(calls.health(service), timeout)

    def _run(self, call: Call[R], timeout: float | None) -> R:
        try:
            response = self._stubs.start(call, self._timeout if timeout is None else timeout)
        except grpc.RpcError as error:
            raise from_rpc_error(error) from error
        return call.convert(response)

    def _stream(self, call: Call[R], timeout: float | None) -> Stream[R]:
        running = self._stubs.start(call, self._timeout if timeout is None else timeout)
        return Stream(running, call.convert)

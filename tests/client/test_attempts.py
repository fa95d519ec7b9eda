"""What the clients send again, when, and what they send only once."""

import asyncio
import threading
import time
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.protobuf.descriptor import FileDescriptor
from tests.client.callers import AsyncCaller, Caller, SyncCaller
from tests.client.every_call import CALLS, GUARDED, ONCE
from tests.client.fake_server import Failure, FakeServer, chunks

import superpose_proto.v1
from superpose_client import errors
from superpose_client.async_client import AsyncClient
from superpose_client.client import Client, Stream

Code = grpc.StatusCode
CUT_OFF = Failure(Code.UNAVAILABLE, "the connection is gone")
FULL = Failure(Code.RESOURCE_EXHAUSTED, "3 are waiting", "QUEUE_FULL", retry_after=0.2)


def after(failures: list[Failure], answer: Any) -> Callable[[Any], Any]:
    """Answers with each of the failures once, then as before."""
    left = list(failures)

    def respond(request: Any) -> Any:
        if left:
            return left.pop(0)
        return answer(request) if callable(answer) else answer

    return respond


def test_the_table_has_every_method_of_the_contract() -> None:
    (folder,) = superpose_proto.v1.__path__
    files: list[FileDescriptor] = [
        import_module(f"superpose_proto.v1.{path.stem}").DESCRIPTOR
        for path in Path(folder).glob("*_pb2.py")
    ]
    methods = {
        method.name
        for file in files
        for service in file.services_by_name.values()
        for method in service.methods
    }
    assert set(CALLS) == methods
    with_guard = {
        message.name.removesuffix("Request")
        for file in files
        for message in file.message_types_by_name.values()
        if "expected_generation" in message.fields_by_name
    }
    assert set(GUARDED) == with_guard


@pytest.mark.parametrize("method", CALLS)
def test_what_changes_nothing_is_sent_again(
    caller: Caller, server: FakeServer, method: str
) -> None:
    arrivals, call = CALLS[method]
    server.answers[method] = after([CUT_OFF], server.answers[method])
    if arrivals == ONCE:
        with pytest.raises(errors.UnavailableError):
            call(caller)
    else:
        call(caller)
    assert len(server.requests) == arrivals


@pytest.mark.parametrize("method", GUARDED)
@pytest.mark.parametrize("failure", [CUT_OFF, FULL], ids=["cut off", "full"])
def test_a_change_that_names_its_generation_is_sent_again(
    caller: Caller, server: FakeServer, method: str, failure: Failure
) -> None:
    server.answers[method] = after([failure], server.answers[method])
    GUARDED[method](caller)
    first, second = server.requests
    assert first == second


def test_a_change_that_may_have_landed_at_the_first_attempt_says_so(
    caller: Caller, server: FakeServer
) -> None:
    late = Failure(Code.ABORTED, "the mix is at 8", "GENERATION_MISMATCH", {"generation": "8"})
    server.answers["SetMix"] = after([CUT_OFF], late)
    with pytest.raises(errors.GenerationMismatchError) as caught:
        caller.set("math", expected_generation=7)
    assert caught.value.message == (
        "the mix is at 8; this call was cut off and sent again, so the change may be its own: look "
        "at the mix before you repeat it"
    )
    assert caught.value.generation == 8


@pytest.mark.parametrize(
    "refused",
    [FULL, Failure(Code.UNAVAILABLE, "it is shutting down", "SHUTTING_DOWN")],
    ids=["full", "shutting down"],
)
def test_a_change_that_was_refused_before_is_not_said_to_have_landed(
    caller: Caller, server: FakeServer, refused: Failure
) -> None:
    late = Failure(Code.ABORTED, "the mix is at 8", "GENERATION_MISMATCH", {"generation": "8"})
    server.answers["SetMix"] = after([refused], late)
    with pytest.raises(errors.GenerationMismatchError, match=r"^the mix is at 8$"):
        caller.set("math", expected_generation=7)
    assert len(server.requests) == 2


def test_the_hint_of_the_server_is_waited_for(caller: Caller, server: FakeServer) -> None:
    server.answers["GetMix"] = after([FULL, FULL], server.answers["GetMix"])
    caller.mix()
    first, second, third = server.arrivals
    assert second - first >= 0.2
    assert third - second >= 0.2


def test_too_much_without_a_hint_is_not_sent_again(caller: Caller, server: FakeServer) -> None:
    server.answers["GetMix"] = Failure(Code.RESOURCE_EXHAUSTED, "the message is too large")
    with pytest.raises(errors.ResourceExhaustedError):
        caller.mix()
    assert len(server.requests) == 1


@pytest.mark.parametrize(
    "code",
    [code for code in Code if code not in (Code.OK, Code.UNAVAILABLE, Code.RESOURCE_EXHAUSTED)],
)
def test_no_other_end_is_followed_by_another_attempt(
    caller: Caller, server: FakeServer, code: grpc.StatusCode
) -> None:
    server.answers["GetMix"] = Failure(code, retry_after=0.01)
    with pytest.raises(errors.CallError):
        caller.mix()
    assert len(server.requests) == 1


def test_pauses_grow_up_to_the_last_attempt(caller: Caller, server: FakeServer) -> None:
    server.answers["GetMix"] = CUT_OFF
    with pytest.raises(errors.UnavailableError, match="the connection is gone"):
        caller.mix()
    assert len(server.requests) == 5
    gaps = [b - a for a, b in zip(server.arrivals, server.arrivals[1:], strict=False)]
    for gap, most in zip(gaps, (0.1, 0.2, 0.4, 0.8), strict=True):
        assert gap >= most / 2


@pytest.mark.parametrize("make", [SyncCaller, AsyncCaller], ids=["sync", "async"])
def test_a_client_without_retries_sends_once(
    make: Callable[..., Caller], server: FakeServer
) -> None:
    server.answers["GetMix"] = server.answers["GenerateStream"] = CUT_OFF
    caller = make(server.address, retries=0)
    with pytest.raises(errors.UnavailableError):
        caller.mix()
    with pytest.raises(errors.UnavailableError):
        caller.collect("stream", "x")
    caller.close()
    assert len(server.requests) == 2


def test_all_attempts_share_one_timeout(caller: Caller, server: FakeServer) -> None:
    server.answers["GetMix"] = after([FULL], server.answers["GetMix"])
    # gRPC writes a timeout as one that it wrote before where they differ by a few in a hundred.
    caller.mix(timeout=2)
    first, second = server.seconds_left
    assert first is not None
    assert second is not None
    assert second <= first - 0.2


def test_a_pause_beyond_the_timeout_is_not_begun(caller: Caller, server: FakeServer) -> None:
    server.answers["GetMix"] = Failure(Code.RESOURCE_EXHAUSTED, reason="X", retry_after=20)
    begun = time.monotonic()
    with pytest.raises(errors.QueueFullError) as caught:
        caller.mix(timeout=15)
    assert time.monotonic() - begun < 10
    assert caught.value.retry_after_seconds == 20
    assert len(server.requests) == 1


def test_a_long_wait_is_left_to_the_caller(caller: Caller, server: FakeServer) -> None:
    failure = Failure(Code.RESOURCE_EXHAUSTED, reason="RATE_LIMITED", retry_after=31)
    server.answers["GenerateStream"] = failure
    with pytest.raises(errors.RateLimitedError) as caught:
        caller.collect("stream", "x")
    assert caught.value.retry_after_seconds == 31
    assert len(server.requests) == 1


def test_a_stream_is_not_begun_again_after_its_first_part(
    caller: Caller, server: FakeServer
) -> None:
    server.answers["GenerateStream"] = lambda request: [chunks(request)[0], CUT_OFF]
    with pytest.raises(errors.UnavailableError):
        caller.collect("stream", "x")
    assert len(server.requests) == 1


def _stream_in_a_pause(server: FakeServer) -> None:
    server.answers["GenerateStream"] = Failure(
        Code.RESOURCE_EXHAUSTED, reason="QUEUE_FULL", retry_after=30
    )


def cancel_when_asked(server: FakeServer, stream: Stream[Any]) -> None:
    server.asked.wait()
    stream.cancel()


def test_a_pause_ends_with_its_stream(server: FakeServer) -> None:
    _stream_in_a_pause(server)
    with Client(server.address) as client:
        stream = client.stream("x")
        threading.Thread(target=cancel_when_asked, args=[server, stream]).start()
        with pytest.raises(errors.RequestCancelledError, match="the stream was cancelled"):
            next(stream)
    assert len(server.requests) == 1


def test_a_pause_ends_with_its_asyncio_stream(server: FakeServer) -> None:
    _stream_in_a_pause(server)

    async def use() -> None:
        async with AsyncClient(server.address) as client:
            stream = client.stream("x")
            first = asyncio.ensure_future(anext(stream))
            await asyncio.to_thread(server.asked.wait)
            stream.cancel()
            with pytest.raises(errors.RequestCancelledError, match="the stream was cancelled"):
                await first

    asyncio.run(use())
    assert len(server.requests) == 1


def test_a_server_that_comes_up_late_is_waited_for(tmp_path: Path) -> None:
    path = tmp_path / "s"
    with Client(f"unix:{path}", retries=40) as client:
        stream = client.watch()
        with FakeServer(path):
            assert next(stream).generation == 7

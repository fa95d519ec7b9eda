import inspect
import pickle
import re
from collections.abc import Iterator
from typing import Any

import grpc
import pytest
from tests.client.callers import AsyncCaller, Caller, SyncCaller
from tests.client.fake_server import Failure, FakeServer, Hang

from superpose_client import errors
from superpose_client.client import Client
from superpose_client.errors import CallError, FieldViolation

Code = grpc.StatusCode


@pytest.fixture(params=[SyncCaller, AsyncCaller], ids=["sync", "async"])
def caller(request: pytest.FixtureRequest, server: FakeServer) -> Iterator[Caller]:
    """Hears the error of the only attempt."""
    made = request.param(server.address, retries=0)
    yield made
    made.close()


def error_of(caller: Caller, server: FakeServer, answer: Failure) -> CallError:
    server.answers["GetMix"] = answer
    with pytest.raises(CallError) as raised:
        caller.mix()
    return raised.value


@pytest.mark.parametrize(
    ("code", "kind"),
    [
        (Code.INVALID_ARGUMENT, errors.InvalidArgumentError),
        (Code.NOT_FOUND, errors.NotFoundError),
        (Code.ALREADY_EXISTS, errors.AlreadyExistsError),
        (Code.FAILED_PRECONDITION, errors.FailedPreconditionError),
        (Code.ABORTED, errors.GenerationMismatchError),
        (Code.RESOURCE_EXHAUSTED, errors.ResourceExhaustedError),
        (Code.UNAVAILABLE, errors.UnavailableError),
        (Code.DEADLINE_EXCEEDED, errors.DeadlineExceededError),
        (Code.CANCELLED, errors.RequestCancelledError),
        (Code.DATA_LOSS, errors.DataLossError),
        (Code.UNIMPLEMENTED, errors.UnimplementedError),
        (Code.INTERNAL, errors.InternalError),
        (Code.UNKNOWN, errors.InternalError),
        (Code.UNAUTHENTICATED, errors.UnauthenticatedError),
        (Code.PERMISSION_DENIED, errors.PermissionDeniedError),
        (Code.OUT_OF_RANGE, CallError),
    ],
)
def test_each_status_is_a_class(
    caller: Caller, server: FakeServer, code: Code, kind: type[CallError]
) -> None:
    error = error_of(
        caller, server, Failure(code, "no such thing: äö", "SOME_REASON", violations={"f": "why"})
    )
    assert type(error) is kind
    assert error.code is code
    assert error.message == str(error) == "no such thing: äö"
    assert error.reason == "SOME_REASON"
    assert error.field_violations == (FieldViolation("f", "why"),)


def test_a_full_queue_says_when_to_come_again(caller: Caller, server: FakeServer) -> None:
    error = error_of(
        caller, server, Failure(Code.RESOURCE_EXHAUSTED, reason="QUEUE_FULL", retry_after=1.25)
    )
    assert isinstance(error, errors.QueueFullError)
    assert error.retry_after_seconds == 1.25


def test_a_token_that_is_used_up_says_when_to_come_again(
    caller: Caller, server: FakeServer
) -> None:
    error = error_of(
        caller, server, Failure(Code.RESOURCE_EXHAUSTED, reason="RATE_LIMITED", retry_after=30)
    )
    assert type(error) is errors.RateLimitedError
    assert error.retry_after_seconds == 30


def test_a_full_queue_that_says_nothing_more(caller: Caller, server: FakeServer) -> None:
    error = error_of(caller, server, Failure(Code.RESOURCE_EXHAUSTED, reason="QUEUE_FULL"))
    assert isinstance(error, errors.QueueFullError)
    assert error.retry_after_seconds is None


def test_a_generation_mismatch_says_what_is_there(caller: Caller, server: FakeServer) -> None:
    metadata = {"generation": str(2**53 + 1), "digest": "ab" * 32}
    error = error_of(caller, server, Failure(Code.ABORTED, reason="GENERATION", metadata=metadata))
    assert isinstance(error, errors.GenerationMismatchError)
    assert error.generation == 2**53 + 1
    assert error.digest == "ab" * 32


def test_a_generation_that_is_no_number_is_none(caller: Caller, server: FakeServer) -> None:
    error = error_of(
        caller, server, Failure(Code.ABORTED, reason="R", metadata={"generation": "x"})
    )
    assert isinstance(error, errors.GenerationMismatchError)
    assert (error.generation, error.digest) == (None, None)


def test_details_of_others_are_not_ours(caller: Caller, server: FakeServer) -> None:
    error = error_of(
        caller,
        server,
        Failure(Code.ABORTED, reason="OTHER", metadata={"generation": "3"}, domain="x"),
    )
    assert error.reason == ""
    assert isinstance(error, errors.GenerationMismatchError)
    assert error.generation is None


def test_a_status_without_details(caller: Caller, server: FakeServer) -> None:
    error = error_of(caller, server, Failure(Code.NOT_FOUND, ""))
    assert isinstance(error, errors.NotFoundError)
    assert error.message == "the call failed with status NOT_FOUND"
    assert (error.reason, error.field_violations) == ("", ())


class _Status(grpc.RpcError):
    """A raised call whose trailing metadata is not what it should be."""

    def __init__(self, trailer: bytes) -> None:
        super().__init__()
        self._trailer = trailer

    def code(self) -> Code:
        return Code.NOT_FOUND

    def details(self) -> str:
        return "gone"

    def trailing_metadata(self) -> Any:
        return [("grpc-status-details-bin", self._trailer)]


@pytest.mark.parametrize("trailer", [b"\xff\xff\xff", b"\x08\x03", b"\x08\x05\x12\x04othe"])
def test_damaged_details_leave_the_status(trailer: bytes) -> None:
    error = errors.from_rpc_error(_Status(trailer))
    assert isinstance(error, errors.NotFoundError)
    assert error.message == "gone"


def test_an_unreachable_server_is_unavailable(caller: Caller, server: FakeServer) -> None:
    server.__exit__(None, None, None)
    with pytest.raises(errors.UnavailableError) as raised:
        caller.mix()
    assert raised.value.reason == ""


def test_a_deadline(caller: Caller, server: FakeServer) -> None:
    server.answers["GetMix"] = Hang()
    with pytest.raises(errors.DeadlineExceededError):
        caller.mix(timeout=0.05)


def test_a_stream_fails_like_a_call(caller: Caller, server: FakeServer) -> None:
    server.answers["GenerateStream"] = Failure(Code.NOT_FOUND, "no math", "UNKNOWN_DOMAIN")
    with pytest.raises(errors.NotFoundError, match="no math") as raised:
        caller.collect("stream", "x")
    assert raised.value.reason == "UNKNOWN_DOMAIN"


def test_errors_can_be_pickled(server: FakeServer) -> None:
    failure = Failure(Code.ABORTED, "m", "R", {"generation": "3", "digest": "d"}, {"f": "why"})
    server.answers["GetMix"] = failure
    with Client(server.address) as client, pytest.raises(CallError) as raised:
        client.mix()
    again = pickle.loads(pickle.dumps(raised.value))
    assert type(again) is errors.GenerationMismatchError
    assert vars(again) == vars(raised.value)
    assert str(again) == "m"


def test_the_tree_in_the_docstring_is_the_tree() -> None:
    drawn = {}
    above = ["SuperposeError"]
    for line in (errors.__doc__ or "").splitlines():
        if match := re.match(r"^ {4}((?:[│ ] {3})*)[├└]── (\w+)", line):
            depth = len(match[1]) // 4 + 1
            above[depth:] = [match[2]]
            drawn[match[2]] = above[depth - 1]
    real = {
        name: kind.__bases__[0].__name__
        for name, kind in inspect.getmembers(errors, inspect.isclass)
        if issubclass(kind, errors.SuperposeError) and kind is not errors.SuperposeError
    }
    assert drawn == real

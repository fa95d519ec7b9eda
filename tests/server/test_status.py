from __future__ import annotations

import pickle
from copy import copy

import grpc
import pytest
from google.rpc import error_details_pb2

from superpose_server import errors
from superpose_server.door.grpc.status import to_status
from superpose_server.errors import ServerError

# One of each kind, and its code as the contract has it.
ERRORS: list[tuple[ServerError, grpc.StatusCode]] = [
    (errors.InvalidArgument("message", "REASON"), grpc.StatusCode.INVALID_ARGUMENT),
    (errors.Unauthenticated("message", "REASON"), grpc.StatusCode.UNAUTHENTICATED),
    (errors.PermissionDenied("message", "REASON"), grpc.StatusCode.PERMISSION_DENIED),
    (errors.NotFound("message", "REASON"), grpc.StatusCode.NOT_FOUND),
    (errors.AlreadyExists("message", "REASON"), grpc.StatusCode.ALREADY_EXISTS),
    (errors.FailedPrecondition("message", "REASON"), grpc.StatusCode.FAILED_PRECONDITION),
    (errors.GenerationMismatch(1, 2, "digest"), grpc.StatusCode.ABORTED),
    (errors.QueueFull(3, 1.0), grpc.StatusCode.RESOURCE_EXHAUSTED),
    (errors.WatchBehind(3), grpc.StatusCode.RESOURCE_EXHAUSTED),
    (errors.ShuttingDown(), grpc.StatusCode.UNAVAILABLE),
    (errors.Unavailable("message", "REASON"), grpc.StatusCode.UNAVAILABLE),
    (errors.DataLoss("message", "REASON"), grpc.StatusCode.DATA_LOSS),
    (errors.Internal("message", "REASON"), grpc.StatusCode.INTERNAL),
]


def test_every_kind_of_error_is_checked_here() -> None:
    # The HTTP door has one of its own, once another test has imported it.
    kinds = {kind for kind in ServerError.__subclasses__() if kind.__module__ == errors.__name__}
    assert {type(error) for error, _ in ERRORS} == kinds


@pytest.mark.parametrize(
    ("error", "code"), ERRORS, ids=[type(error).__name__ for error, _ in ERRORS]
)
def test_an_error_and_what_derives_from_it_share_a_code(
    error: ServerError, code: grpc.StatusCode
) -> None:
    error = copy(error)  # Whose kind changes.
    derived = type("Derived", (type("Between", (type(error),), {}),), {})
    for kind in (type(error), derived):
        error.__class__ = kind
        found, status = to_status(error)
        assert found is code
        assert (status.code, status.message) == (code.value[0], error.message)
        info = error_details_pb2.ErrorInfo()
        assert status.details[0].Unpack(info)
        assert (info.reason, info.domain) == (error.reason, "superpose")
        assert dict(info.metadata) == error.metadata


@pytest.mark.parametrize(
    "error",
    [
        *(error for error, _ in ERRORS),
        errors.OutputNotFinite("mixes[1]", row=3),
        errors.FitRunning(2.0),
        errors.RateLimited("too much", 2.0),
        errors.AdapterAway("why"),
        errors.ReplicaUnfit("why"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_an_error_goes_to_another_process_as_it_is(error: ServerError) -> None:
    again = pickle.loads(pickle.dumps(error))
    assert type(again) is type(error)
    assert (str(again), vars(again)) == (str(error), vars(error))


def test_an_error_of_no_kind_is_internal_and_says_what_it_says() -> None:
    code, status = to_status(ServerError("what stands", "REASON"))
    assert code is grpc.StatusCode.INTERNAL
    assert status.message == "what stands"


def test_what_is_no_error_of_the_server_says_nothing() -> None:
    code, status = to_status(KeyError("secret detail"))
    assert code is grpc.StatusCode.INTERNAL
    assert status.message == "internal error"
    assert "secret" not in str(status)

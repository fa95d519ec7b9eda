"""Errors in OpenAI's form."""

from __future__ import annotations

import pytest

from superpose_server.door.http.status import HttpError, to_answer
from superpose_server.errors import (
    AdapterAway,
    AlreadyExists,
    DataLoss,
    FailedPrecondition,
    FitRunning,
    GenerationMismatch,
    Internal,
    InvalidArgument,
    NotFound,
    OutputNotFinite,
    PermissionDenied,
    QueueFull,
    RateLimited,
    ReplicaUnfit,
    ServerError,
    ShuttingDown,
    Unauthenticated,
    Unavailable,
    WatchBehind,
)

CASES: list[tuple[Exception, int, str]] = [
    (InvalidArgument("m", "R", field="f"), 400, "invalid_request_error"),
    (Unauthenticated("m", "R"), 401, "invalid_request_error"),
    (PermissionDenied("m", "R"), 403, "invalid_request_error"),
    (NotFound("m", "R"), 404, "invalid_request_error"),
    (AlreadyExists("m", "R"), 409, "invalid_request_error"),
    (FailedPrecondition("m", "R"), 409, "invalid_request_error"),
    (OutputNotFinite(), 409, "invalid_request_error"),
    (GenerationMismatch(1, 2, "d"), 412, "invalid_request_error"),
    (HttpError(413, "m", "R"), 413, "invalid_request_error"),
    (QueueFull(3, 0.2), 429, "rate_limit_error"),
    (FitRunning(10.0), 429, "rate_limit_error"),
    (RateLimited("m", 20.0), 429, "rate_limit_error"),
    (WatchBehind(3), 429, "rate_limit_error"),
    (ShuttingDown(), 503, "server_error"),
    (Unavailable("m", "R"), 503, "server_error"),
    (AdapterAway("why"), 503, "server_error"),
    (ReplicaUnfit("why"), 503, "server_error"),
    (DataLoss("m", "R"), 500, "server_error"),
    (Internal("m", "R"), 500, "server_error"),
    (RuntimeError("secret"), 500, "server_error"),
]


@pytest.mark.parametrize(("error", "status", "kind"), CASES)
def test_every_error_has_its_status_and_says_why(error: Exception, status: int, kind: str) -> None:
    found, body, headers = to_answer(error)
    told = body["error"]
    assert (found, told["type"]) == (status, kind)
    if isinstance(error, ServerError):
        assert (told["message"], told["code"]) == (error.message, error.reason)
        assert told["param"] == error.field
        assert told.get("metadata", {}) == error.metadata
    else:
        assert (told["message"], told["code"]) == ("internal error", "INTERNAL")
    # OpenAI's clients would ask again by themselves.
    assert (headers.get("x-should-retry") == "false") == (status in (409, 500))


def test_no_error_is_without_a_case() -> None:
    def below(kind: type[ServerError]) -> set[type[ServerError]]:
        return {kind}.union(*map(below, kind.__subclasses__()))

    assert below(ServerError) - {ServerError} == {
        type(error) for error, _, _ in CASES if isinstance(error, ServerError)
    }


def test_a_client_that_comes_too_early_is_told_whole_seconds() -> None:
    assert to_answer(QueueFull(3, 0.2))[2]["retry-after"] == "1"
    assert to_answer(QueueFull(3, 1.5))[2]["retry-after"] == "2"

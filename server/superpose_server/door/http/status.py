"""The one place that turns errors into HTTP: a status, and a body in OpenAI's form."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from starlette.responses import Response

from superpose_server.door.http.json_text import json_answer
from superpose_server.errors import (
    AlreadyExists,
    DataLoss,
    FailedPrecondition,
    GenerationMismatch,
    Internal,
    InvalidArgument,
    NotFound,
    PermissionDenied,
    QueueFull,
    ServerError,
    ShuttingDown,
    Unauthenticated,
    Unavailable,
    WatchBehind,
)

_STATUSES: dict[type[ServerError], int] = {
    InvalidArgument: 400,
    Unauthenticated: 401,
    PermissionDenied: 403,
    NotFound: 404,
    AlreadyExists: 409,
    FailedPrecondition: 409,
    GenerationMismatch: 412,
    QueueFull: 429,
    WatchBehind: 429,
    ShuttingDown: 503,
    Unavailable: 503,
    DataLoss: 500,
    ServerError: 500,
}
# OpenAI's clients repeat these by themselves, which helps nobody: the answer would be the same.
_FINAL = {409, 500}
# JSON Schema of the body.
ERROR: Mapping[str, Any] = {
    "type": "object",
    "properties": {
        "error": {
            "type": "object",
            "properties": {
                "message": {"type": "string"},
                "type": {"enum": ["invalid_request_error", "rate_limit_error", "server_error"]},
                "param": {"type": ["string", "null"]},
                "code": {"type": "string"},
                "metadata": {"type": "object", "additionalProperties": {"type": "string"}},
            },
            "required": ["message", "type", "param", "code"],
        }
    },
    "required": ["error"],
}


class HttpError(ServerError):
    """What only HTTP can get wrong: a path, a method, a header, a length.

    Attributes:
        status: The status of the answer.
        headers: Headers that it needs beside the usual ones.
    """

    def __init__(
        self,
        status: int,
        message: str,
        reason: str,
        *,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        """Hold these."""
        super().__init__(message, reason)
        self.status = status
        self.headers = dict(headers or {})


def to_answer(error: Exception) -> tuple[int, dict[str, Any], dict[str, str]]:
    """Return status, body and headers of an error.

    What is not a `ServerError` is a fault of ours: clients learn no more than that.
    """
    if not isinstance(error, ServerError):
        error = Internal("internal error", "INTERNAL")
    headers: dict[str, str] = {}
    if isinstance(error, HttpError):
        status = error.status
        headers |= error.headers
    else:
        status = next(_STATUSES[kind] for kind in type(error).__mro__ if kind in _STATUSES)
    if isinstance(error, QueueFull):
        headers["retry-after"] = str(math.ceil(error.retry_after_seconds))
    if isinstance(error, Unauthenticated):
        # The words of RFC 6750, which has none for a request that came without a token.
        sent = error.reason != "TOKEN_MISSING"
        headers["www-authenticate"] = 'Bearer error="invalid_token"' if sent else "Bearer"
    if status in _FINAL:
        headers["x-should-retry"] = "false"
    told: dict[str, Any] = {
        "message": error.message,
        "type": _kind(status),
        "param": error.field,
        "code": error.reason,
    }
    if error.metadata:
        told["metadata"] = error.metadata
    return status, {"error": told}, headers


def _kind(status: int) -> str:
    if status >= 500:
        return "server_error"
    return "rate_limit_error" if status == 429 else "invalid_request_error"


def error_response(error: Exception) -> Response:
    """Return the answer of a call that raised."""
    status, body, headers = to_answer(error)
    return json_answer(body, status, headers)

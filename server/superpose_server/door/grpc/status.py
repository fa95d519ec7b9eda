"""The one place that turns errors into gRPC statuses (google.rpc.Status with details)."""

from __future__ import annotations

import logging
import math
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any, NoReturn

import grpc
from google.protobuf import any_pb2, duration_pb2
from google.protobuf.message import DecodeError
from google.rpc import code_pb2, error_details_pb2, status_pb2

from superpose_server.door.grpc.handlers import around
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

_CODES: dict[type[ServerError], grpc.StatusCode] = {
    InvalidArgument: grpc.StatusCode.INVALID_ARGUMENT,
    Unauthenticated: grpc.StatusCode.UNAUTHENTICATED,
    PermissionDenied: grpc.StatusCode.PERMISSION_DENIED,
    NotFound: grpc.StatusCode.NOT_FOUND,
    AlreadyExists: grpc.StatusCode.ALREADY_EXISTS,
    FailedPrecondition: grpc.StatusCode.FAILED_PRECONDITION,
    GenerationMismatch: grpc.StatusCode.ABORTED,
    QueueFull: grpc.StatusCode.RESOURCE_EXHAUSTED,
    WatchBehind: grpc.StatusCode.RESOURCE_EXHAUSTED,
    ShuttingDown: grpc.StatusCode.UNAVAILABLE,
    Unavailable: grpc.StatusCode.UNAVAILABLE,
    DataLoss: grpc.StatusCode.DATA_LOSS,
    ServerError: grpc.StatusCode.INTERNAL,
}
_DETAILS_KEY = "grpc-status-details-bin"
_log = logging.getLogger(__name__)


def to_status(error: Exception) -> tuple[grpc.StatusCode, status_pb2.Status]:
    """Return the code and the google.rpc.Status of an error.

    What is not a `ServerError` is a fault of ours: clients learn no more than that.
    """
    if not isinstance(error, ServerError):
        error = Internal("internal error", "INTERNAL")
    code = next(_CODES[kind] for kind in type(error).__mro__ if kind in _CODES)
    details: list[Any] = [
        error_details_pb2.ErrorInfo(
            reason=error.reason, domain="superpose", metadata=error.metadata
        )
    ]
    if error.field is not None:
        violation = error_details_pb2.BadRequest.FieldViolation(
            field=error.field, description=error.message
        )
        details.append(error_details_pb2.BadRequest(field_violations=[violation]))
    if isinstance(error, QueueFull):
        delay = duration_pb2.Duration()
        delay.FromMilliseconds(math.ceil(error.retry_after_seconds * 1000))
        details.append(error_details_pb2.RetryInfo(retry_delay=delay))
    status = status_pb2.Status(code=code_pb2.Code.Value(code.name), message=error.message)
    for detail in details:
        packed = any_pb2.Any()
        packed.Pack(detail)
        status.details.append(packed)
    return code, status


class ErrorInterceptor(grpc.aio.ServerInterceptor):  # type: ignore[type-arg]  # not at run time
    """Ends every call that raised with the status of its error."""

    def __init__(self, failed: Callable[[str], None]) -> None:
        """Call `failed` with the reason of each error."""
        self._failed = failed

    async def intercept_service(
        self, continuation: Callable[[Any], Awaitable[Any]], details: grpc.HandlerCallDetails
    ) -> Any:
        """Wrap the handler of a call."""
        handler = await continuation(details)
        if handler is None:
            return handler
        # Only reflection takes several requests.
        read = _read_each if handler.request_streaming else _read
        return around(
            handler,
            lambda call: self._unary(call, details.method),
            lambda call: self._stream(call, read, details.method),
            _reading(handler.request_deserializer),
        )

    def _unary(self, call: Callable[..., Awaitable[Any]], method: str) -> Any:
        async def wrapped(request: Any, context: Any) -> Any:
            try:
                return await call(_read(request), context)
            except Exception as error:
                await self._abort(context, method, error)

        return wrapped

    def _stream(
        self, call: Callable[..., AsyncIterator[Any]], read: Callable[[Any], Any], method: str
    ) -> Any:
        async def wrapped(request: Any, context: Any) -> AsyncIterator[Any]:
            try:
                async for response in call(read(request), context):
                    yield response
            except Exception as error:
                await self._abort(context, method, error)

        return wrapped

    async def _abort(self, context: Any, method: str, error: Exception) -> NoReturn:
        if isinstance(error, grpc.aio.AbortError):
            raise error
        code, status = to_status(error)
        reason = error.reason if isinstance(error, ServerError) else "INTERNAL"
        self._failed(reason)
        peer = context.peer()
        if isinstance(error, ServerError):
            _log.info(
                "refused method=%s peer=%s code=%s reason=%s", method, peer, code.name, reason
            )
        else:
            _log.error("failed method=%s peer=%s", method, peer, exc_info=error)
        await context.abort(code, status.message, ((_DETAILS_KEY, status.SerializeToString()),))
        raise AssertionError("abort returns never")


def _reading(deserialize: Callable[[bytes], Any]) -> Callable[[bytes], Any]:
    """Return a deserializer that returns an error in place of raising one.

    gRPC would answer UNKNOWN with words of its own, and no handler would hear of it.
    """

    def read(data: bytes) -> Any:
        try:
            return deserialize(data)
        except DecodeError:
            return InvalidArgument(
                "the request cannot be read: it is not the protobuf message of this call, or a "
                "text in it is not UTF-8",
                "REQUEST_UNREADABLE",
            )

    return read


def _read(request: Any) -> Any:
    if isinstance(request, ServerError):
        raise request
    return request


async def _read_each(requests: AsyncIterator[Any]) -> AsyncIterator[Any]:
    async for request in requests:
        yield _read(request)

"""Everything the client raises, and the one place where a gRPC status becomes an exception.

    SuperposeError
    ├── MixSyntaxError (also ValueError)   bad MIX syntax; nothing was sent
    ├── AccessError (also ValueError)      a token, certificate or CA is of no use; not sent
    ├── AddressError (also ValueError)     an address is missing, or more than one is too many
    ├── AdapterFolderError                 a folder is no adapter that can be pushed
    ├── MixChangedError                    the parts of one score saw different mixes
    ├── ClientClosedError                  a call of a client that was closed
    ├── NotPicklableError (also TypeError) clients and streams stay in their process
    └── CallError                          a call failed; has code, reason, field_violations
        ├── InvalidArgumentError           bad mix, prompt or option: do not repeat the call
        ├── NotFoundError                  unknown name, or a domain not in the mix
        ├── AlreadyExistsError             in the mix already, or the name is taken
        ├── FailedPreconditionError        something must be put right before the call can work
        ├── GenerationMismatchError        the mix is not at `expected_generation`
        ├── UnauthenticatedError           the token is missing, unknown or expired
        ├── PermissionDeniedError          the token does not allow this call
        ├── ResourceExhaustedError         too large, or too much; has retry_after_seconds
        │   ├── QueueFullError             the server takes no more at the moment
        │   └── RateLimitedError           the token's limit is used up for the moment
        ├── UnavailableError               no server there, or it is shutting down
        ├── DeadlineExceededError          no answer in time; a change may still have landed
        ├── RequestCancelledError          cancelled on either side
        ├── DataLossError                  the weights failed their hash
        ├── UnimplementedError             the server does not know the call
        └── InternalError                  a fault in the server; its log says more

Statuses without a class of their own are plain CallErrors.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import cast

import grpc
from google.protobuf.message import DecodeError, Message
from google.rpc import error_details_pb2
from grpc_status import rpc_status

_DOMAIN = "superpose"
_DETAILS: tuple[type[Message], ...] = (
    error_details_pb2.ErrorInfo,
    error_details_pb2.RetryInfo,
    error_details_pb2.BadRequest,
)


@dataclass(frozen=True)
class FieldViolation:
    """A field of the request that is at fault, and why."""

    field: str
    description: str


class SuperposeError(Exception):
    """Base of everything that this package raises on its own account."""

    @property
    def message(self) -> str:
        """What went wrong, in one sentence."""
        return str(self)


class MixSyntaxError(SuperposeError, ValueError):
    """A text is not in MIX syntax."""


class AccessError(SuperposeError, ValueError):
    """What a client should be let in with cannot be used, or would go out unencrypted."""


class AddressError(SuperposeError, ValueError):
    """A client has too few addresses, or too many for a call; nothing was sent."""


class AdapterFolderError(SuperposeError):
    """A folder does not hold an adapter that can be pushed."""


class MixChangedError(SuperposeError):
    """The requests that one call was split into were answered under different mixes."""


class ClientClosedError(SuperposeError):
    """A call was made on a client that had been closed; nothing was sent."""


class NotPicklableError(SuperposeError, TypeError):
    """Clients and streams hold a connection, which cannot be copied or sent to another process."""


class CallError(SuperposeError):
    """A call ended with a status other than OK."""

    # Defaults of the class, set on the instance by `from_rpc_error`, so that the exceptions can
    # be pickled (a process pool does that): exceptions with more arguments than one cannot.
    code: grpc.StatusCode = grpc.StatusCode.UNKNOWN
    reason: str = ""
    """ErrorInfo.reason in UPPER_SNAKE; empty if the status is not of Superpose's making."""
    field_violations: tuple[FieldViolation, ...] = ()

    def add(self, more: str) -> None:
        """Let the message end with what the client knows beyond what the server said."""
        self.args = (f"{self.message}; {more}",)


class InvalidArgumentError(CallError):
    """The request can never work, whatever the state of the server."""


class NotFoundError(CallError):
    """The name stands for nothing, or the domain is not in the mix that it should leave."""


class AlreadyExistsError(CallError):
    """The domain is in the mix already, or the name stands for other bytes, or a mix."""


class FailedPreconditionError(CallError):
    """The request fits neither the base nor the present state; do not repeat it as it is."""


class GenerationMismatchError(CallError):
    """The default mix is not at the `expected_generation`; nothing was changed.

    `generation` and `digest` are the current ones, so a caller whose earlier change was cut off
    can tell whether it landed. None if the server did not say.
    """

    generation: int | None = None
    digest: str | None = None


class UnauthenticatedError(CallError):
    """The server knows nobody by this token, or wants one."""


class PermissionDeniedError(CallError):
    """The server knows the token, which does not allow this call, or a domain of its mix."""


class ResourceExhaustedError(CallError):
    """A limit was hit. None: the server did not say that waiting helps."""

    retry_after_seconds: float | None = None


class QueueFullError(ResourceExhaustedError):
    """The server takes no more requests of this kind at the moment."""


class RateLimitedError(ResourceExhaustedError):
    """The server takes no more requests of this token at the moment."""


class UnavailableError(CallError):
    """The server cannot be reached (`reason` is empty) or is shutting down."""


class DeadlineExceededError(CallError):
    """No answer within the timeout. A change that was asked for may have landed all the same."""


class RequestCancelledError(CallError):
    """The call was cancelled, by this client or by the server."""


class DataLossError(CallError):
    """The weights failed their hash."""


class UnimplementedError(CallError):
    """The server does not know this call: another version, or another service."""


class InternalError(CallError):
    """A fault in the server."""


_CLASSES: dict[grpc.StatusCode, type[CallError]] = {
    grpc.StatusCode.INVALID_ARGUMENT: InvalidArgumentError,
    grpc.StatusCode.NOT_FOUND: NotFoundError,
    grpc.StatusCode.ALREADY_EXISTS: AlreadyExistsError,
    grpc.StatusCode.FAILED_PRECONDITION: FailedPreconditionError,
    grpc.StatusCode.ABORTED: GenerationMismatchError,
    grpc.StatusCode.UNAUTHENTICATED: UnauthenticatedError,
    grpc.StatusCode.PERMISSION_DENIED: PermissionDeniedError,
    grpc.StatusCode.RESOURCE_EXHAUSTED: ResourceExhaustedError,
    grpc.StatusCode.UNAVAILABLE: UnavailableError,
    grpc.StatusCode.DEADLINE_EXCEEDED: DeadlineExceededError,
    grpc.StatusCode.CANCELLED: RequestCancelledError,
    grpc.StatusCode.DATA_LOSS: DataLossError,
    grpc.StatusCode.UNIMPLEMENTED: UnimplementedError,
    grpc.StatusCode.INTERNAL: InternalError,
    grpc.StatusCode.UNKNOWN: InternalError,
}

# What gRPC says of a server that it cannot reach.
_UNREACHED = (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED)


def from_rpc_error(error: grpc.RpcError, proxy: str | None = None) -> CallError:
    """Return the exception for a failed call, of `grpc` or of `grpc.aio`.

    Args:
        error: What gRPC raised.
        proxy: What to call the proxy on the way to the server, if there is one.
    """
    info = error_details_pb2.ErrorInfo()
    retry: error_details_pb2.RetryInfo | None = None
    violations: list[FieldViolation] = []
    for detail in _details(error):
        if isinstance(detail, error_details_pb2.ErrorInfo) and detail.domain == _DOMAIN:
            info = detail
        elif isinstance(detail, error_details_pb2.RetryInfo):
            retry = detail
        elif isinstance(detail, error_details_pb2.BadRequest):
            violations += [FieldViolation(v.field, v.description) for v in detail.field_violations]

    code = error.code()
    kind = _CLASSES.get(code, CallError)
    # gRPC itself uses RESOURCE_EXHAUSTED for messages over the limit, which no waiting helps.
    if kind is ResourceExhaustedError and info.reason == "RATE_LIMITED":
        kind = RateLimitedError
    elif kind is ResourceExhaustedError and (retry is not None or info.reason == "QUEUE_FULL"):
        kind = QueueFullError
    message = error.details() or f"the call failed with status {code.name}"
    # gRPC says nothing of the proxy that it could not get through.
    if proxy is not None and not info.reason and code in _UNREACHED:
        message += f"; by way of {proxy}"
    made = kind(message)
    made.code = code
    made.reason = info.reason
    made.field_violations = tuple(violations)
    if isinstance(made, ResourceExhaustedError) and retry is not None:
        made.retry_after_seconds = retry.retry_delay.ToTimedelta().total_seconds()
    if isinstance(made, GenerationMismatchError):
        generation = info.metadata.get("generation", "")
        made.generation = int(generation) if generation.isdecimal() else None
        made.digest = info.metadata.get("digest") or None
    return made


def _details(error: grpc.RpcError) -> Iterator[Message]:
    """Yield the google.rpc details of a status, of the kinds that we know."""
    try:
        # Raised errors are calls too; the stubs do not say so.
        status = rpc_status.from_call(cast(grpc.Call, error))
        for packed in status.details if status is not None else ():
            for kind in _DETAILS:
                if packed.Is(kind.DESCRIPTOR):
                    detail = kind()
                    packed.Unpack(detail)
                    yield detail
    except (ValueError, DecodeError):
        # Details that contradict the status, or do not parse, come from something between us and
        # the server. The status itself still tells what happened.
        return

"""One call: what it sends, what it makes of the answer, and how a client's method comes of it.

Nothing here waits: `client` and `async_client` do, each in its own way.
"""

import math
from collections.abc import Callable, Generator
from dataclasses import dataclass
from inspect import Parameter
from typing import Any, Generic, TypeVar, get_args

import grpc
from google.protobuf.message import Message
from grpc_health.v1 import health_pb2_grpc

from superpose_client.channel import proxy_of
from superpose_client.errors import CallError, ClientClosedError, from_rpc_error
from superpose_client.keywords import spelled_out
from superpose_proto.v1 import (
    adapter_pb2_grpc,
    audit_pb2_grpc,
    inference_pb2_grpc,
    mix_pb2_grpc,
    server_pb2_grpc,
)

DEFAULT_TARGET = "127.0.0.1:50051"

CONTROL = 60.0  # seconds, for calls that look something up or change the mix
WORK = 600.0  # seconds, for calls that compute
UNLIMITED = math.inf

R = TypeVar("R")
F = TypeVar("F", bound=Callable[..., Any])


@dataclass(frozen=True)
class Call(Generic[R]):
    """One call: `method` is Service.Method; `convert` turns a response into the result.

    `timeout` is what the caller gave, `usual_timeout` what holds if the client has none either.
    """

    method: str
    request: Message
    convert: Callable[[Any], R]
    timeout: float | None
    usual_timeout: float = CONTROL

    def __iter__(self) -> "Calls[R]":
        """Yield the call itself and return what comes back, so that it runs like several."""
        result: R = yield self
        return result


Calls = Generator[Call[Any], Any, R]
"""Calls in turn: each is yielded, its result sent or its error thrown in; the end is the result."""


class Stubs:
    """The stubs of all services on one channel, of `grpc` or of `grpc.aio`."""

    def __init__(self, channel: Any, target: str, timeout: float | None) -> None:
        """Make the stubs; nothing is sent. `timeout` is that of calls that have none."""
        self.closed = False
        self._proxy = proxy_of(target)
        self._timeout = timeout
        self._stubs: dict[str, Any] = {
            "Inference": inference_pb2_grpc.InferenceServiceStub(channel),
            "Mix": mix_pb2_grpc.MixServiceStub(channel),
            "Adapter": adapter_pb2_grpc.AdapterServiceStub(channel),
            "Server": server_pb2_grpc.ServerServiceStub(channel),
            "Audit": audit_pb2_grpc.AuditServiceStub(channel),
            "Health": health_pb2_grpc.HealthStub(channel),
        }

    def start(self, call: Call[Any]) -> Any:
        """Invoke a call and return what the stub does.

        Raises:
            ClientClosedError: The client was closed.
        """
        given = (call.timeout, self._timeout, call.usual_timeout)
        seconds = next(timeout for timeout in given if timeout is not None)
        service, method = call.method.split(".")
        stub = getattr(self._stubs[service], method)
        try:
            # gRPC writes no deadline as None, and takes no infinity.
            return stub(call.request, timeout=None if math.isinf(seconds) else seconds)
        except (ValueError, grpc.aio.UsageError) as error:
            if not self.closed:
                raise
            raise ClientClosedError("the client is closed: make a new one") from error

    def failed(self, error: grpc.RpcError) -> CallError:
        """Return the exception for a call that failed."""
        return from_rpc_error(error, self._proxy)


def as_method_of(call: Callable[..., Any], method: F, stream: Any = None) -> F:
    """Give a method the name, the documentation and the signature of what makes its call.

    It returns the result of the call, or a `stream` of them.
    """
    made = spelled_out(call)
    result = get_args(made.return_annotation)[-1]
    me = Parameter("self", Parameter.POSITIONAL_OR_KEYWORD)
    signature = made.replace(
        parameters=[me, *made.parameters.values()],
        return_annotation=result if stream is None else stream[result],
    )
    method.__name__ = method.__qualname__ = call.__name__
    method.__doc__ = call.__doc__
    method.__signature__ = signature  # type: ignore[attr-defined]
    method.__annotations__ = {name: made.parameters[name].annotation for name in made.parameters}
    method.__annotations__["return"] = signature.return_annotation
    return method

"""One call: what it sends, what it makes of the answer, and how a client's method comes of it.

Nothing here waits: `client` and `async_client` do, each in its own way.
"""

import math
from collections.abc import Callable, Generator
from dataclasses import dataclass
from inspect import Parameter
from typing import Any, Generic, TypeVar, get_args

from google.protobuf.message import Message

from superpose_client.keywords import spelled_out

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

"""Handlers of gRPC, and how an interceptor puts something around one."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import grpc


def around(
    handler: Any,
    unary: Callable[[Any], Any],
    stream: Callable[[Any], Any],
    read: Callable[[bytes], Any] | None = None,
) -> Any:
    """Return a handler like another, whose call is what `unary` or `stream` makes of its call.

    Args:
        handler: Of a call that takes one request, or whose requests and responses both stream.
        unary: For what is awaited: gets and returns a coroutine function of request and context.
        stream: For what is iterated: gets a function that returns an async iterator.
        read: Makes requests of bytes; None: as before.
    """
    read = read or handler.request_deserializer
    if handler.request_streaming:
        make, call = grpc.stream_stream_rpc_method_handler, stream(handler.stream_stream)
    elif handler.response_streaming:
        # One that sends its responses by `context.write`, as health does, is awaited.
        wrap = unary if inspect.iscoroutinefunction(handler.unary_stream) else stream
        make, call = grpc.unary_stream_rpc_method_handler, wrap(handler.unary_stream)
    else:
        make, call = grpc.unary_unary_rpc_method_handler, unary(handler.unary_unary)
    return make(call, read, handler.response_serializer)

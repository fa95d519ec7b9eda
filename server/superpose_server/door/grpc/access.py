"""Who may call, over gRPC: asked of every call in this one interceptor."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import grpc

from superpose_server.door.access.access import Access
from superpose_server.door.access.scopes import Needs
from superpose_server.door.grpc.handlers import around
from superpose_server.errors import Unauthenticated


class AccessInterceptor(grpc.aio.ServerInterceptor):  # type: ignore[type-arg]  # not at run time
    """Lets calls through that `Access` does; behind an `ErrorInterceptor`, which tells the rest."""

    def __init__(self, access: Access, needs: Needs) -> None:
        """Ask `access`; each method, by its path, needs what `needs` says."""
        self._access = access
        self._needs = needs

    async def intercept_service(
        self, continuation: Callable[[Any], Awaitable[Any]], details: grpc.HandlerCallDetails
    ) -> Any:
        """Refuse a call, or wrap its handler."""
        handler = await continuation(details)
        if handler is None:
            return handler
        try:
            token = self._access.check(_authorization(details), self._needs[details.method])
        except Exception as error:  # Whatever it is, gRPC would tell all of it.
            return _refusing(error)

        def begin(context: Any) -> None:
            end = self._access.begin(token, context.peer())
            context.add_done_callback(lambda _: end())

        def unary(call: Callable[[Any, Any], Awaitable[Any]]) -> Any:
            async def run(request: Any, context: Any) -> Any:
                begin(context)
                return await call(request, context)

            return run

        def stream(call: Callable[[Any, Any], AsyncIterator[Any]]) -> Any:
            def run(request: Any, context: Any) -> AsyncIterator[Any]:
                begin(context)
                return call(request, context)

            return run

        return around(handler, unary, stream)


def _authorization(details: grpc.HandlerCallDetails) -> str | None:
    metadata = details.invocation_metadata or ()
    # Only under names that end in -bin are there bytes.
    values = [str(value) for name, value in metadata if name == "authorization"]
    if len(values) > 1:
        raise Unauthenticated(
            f"authorization is sent {len(values)} times: send it once", "TOKEN_UNKNOWN"
        )
    return values[0] if values else None


def _refusing(error: Exception) -> Any:
    """Return a handler that raises `error`, whatever the call.

    One whose requests stream: so nothing of a request is read, as much as it may be.
    """

    async def refuse(requests: Any, context: Any) -> AsyncIterator[bytes]:
        raise error
        yield b""  # What makes this a stream.

    return grpc.stream_stream_rpc_method_handler(refuse, bytes, bytes)

"""What holds for every call: it has an id, and if it raised its error is its answer."""

from __future__ import annotations

import logging
import re
import uuid
from collections.abc import Callable

from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from superpose_server.door.http.header import header
from superpose_server.door.http.peer import peer_of
from superpose_server.door.http.status import error_response, to_answer
from superpose_server.errors import InvalidArgument, ServerError

# What may stand in a header and in a log, and no longer than gRPC's request_id may be.
_REQUEST_ID = re.compile(r"[ -~]{1,256}")
_log = logging.getLogger(__name__)


class Calls:
    """Gives every call its id (`request.state.request_id`) and answers those that raised.

    Any answer, of an error too, has the header fields that were added to `request.state.headers`.
    """

    def __init__(self, app: ASGIApp, failed: Callable[[str], None]) -> None:
        """Wrap `app`, and call `failed` with the reason of each error."""
        self._app = app
        self._failed = failed

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one call."""
        request_id = str(uuid.uuid4())
        headers: list[tuple[bytes, bytes]] = scope["state"].setdefault("headers", [])
        started = ended = False

        async def send_with_headers(message: Message) -> None:
            nonlocal started, ended
            if not started:
                started = True
                message["headers"] += [(b"x-request-id", request_id.encode()), *headers]
            else:
                ended = not message.get("more_body", False)
            await send(message)

        try:
            request_id = _sent_id(scope) or request_id
            scope["state"]["request_id"] = request_id
            await self._app(scope, receive, send_with_headers)
        except ClientDisconnect:
            return  # Within its body: nobody is left to be told.
        except Exception as error:
            self._note(scope, error)
            if not started:
                await error_response(error)(scope, receive, send_with_headers)
            elif not ended:
                raise  # The connection is closed, so that nobody takes the answer for whole.

    def _note(self, scope: Scope, error: Exception) -> None:
        """Count an error and write it to the log."""
        status, body, _ = to_answer(error)
        reason = body["error"]["code"]
        self._failed(reason)
        call = f"{scope['method']} {scope['path'][:200]!r} peer={peer_of(scope)}"
        if isinstance(error, ServerError):
            _log.info("refused call=%s status=%d reason=%s", call, status, reason)
        else:
            _log.error("failed call=%s", call, exc_info=error)


def _sent_id(scope: Scope) -> str:
    sent = header(scope, "x-request-id") or ""
    if sent and not _REQUEST_ID.fullmatch(sent):
        raise InvalidArgument(
            f"x-request-id has {len(sent)} characters, or some that are not ASCII: send 1 to 256 "
            "characters, or none",
            "BAD_REQUEST_ID",
            field="x-request-id",
        )
    return sent

"""The bounds of a connection: what a request's head may hold, and how long a request may take.

httptools keeps what it is sent until it is whole, and uvicorn waits for it for ever. Here one that
is too large or too slow is told so and its connection ended, before any code of ours hears of it.
The bound on bodies is that of their readers, who know what they read; see `body`.
"""

from __future__ import annotations

import asyncio
from typing import Any

from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol

from superpose_server.door.door import CLOSING_SECONDS
from superpose_server.door.http.json_text import to_json
from superpose_server.door.http.status import HttpError, to_answer
from superpose_server.errors import ServerError, ShuttingDown

MOST_CONNECTIONS = 512
MOST_FIELDS = 100  # header fields of a request
MOST_HEAD_BYTES = 1 << 16  # of its target and header fields, and of any one thing between them
# A request may take so many seconds, and one more for each so many bytes that have arrived.
PATIENCE_SECONDS = 30.0
SLOWEST_BYTES = 1 << 14
# Bytes of a body that are read and thrown away after its answer, so that the client hears it:
# closing a socket with something unread in it would take back what was sent.
MOST_DISCARDED = 1 << 26
# The same of what is still sent when a connection is ended.
LINGER_SECONDS = 2.0
# What answers get at the server's end.
LAST_SECONDS = CLOSING_SECONDS - 0.5


class BoundedProtocol(HttpToolsProtocol):
    """uvicorn's connection, with an end to what it waits for and to what it keeps."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        """Begin without a request."""
        super().__init__(*args, **kwargs)
        self._timer: asyncio.TimerHandle | None = None  # While a request is due or arrives.
        self._began = 0.0
        self._arrived = 0
        self._in_head = True
        self._fields = self._head = self._unread = self._discarded = 0
        self._fault: HttpError | None = None
        self._refused = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """See `asyncio.Protocol`."""
        super().connection_made(transport)  # type: ignore[arg-type]  # it is a Transport
        self._wait()
        if len(self.connections) > MOST_CONNECTIONS:
            self._make_room()

    def connection_lost(self, exc: Exception | None) -> None:
        """See `asyncio.Protocol`."""
        self._rest()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """See `asyncio.Protocol`."""
        if self._refused:  # Lingers.
            return
        if self._timer is None and not self._runs():
            self._wait()  # Even empty lines, which begin no request.
        self._unread += len(data)
        super().data_received(data)
        self._arrived += len(data)  # Behind what began with it.
        if self._unread > MOST_HEAD_BYTES:
            # Nothing has come of all this: a field, a trailer, or a chunk's extension, without end.
            self._refuse(_too_large())

    def send_400_response(self, msg: str) -> None:
        """Answer what is no HTTP, or too much of it, in our form."""
        self._refuse(
            self._fault
            or HttpError(
                400,
                "the request is not HTTP/1.1, or its head is malformed: use an HTTP client",
                "REQUEST_MALFORMED",
            )
        )

    def shutdown(self) -> None:
        """End what is idle, and what has not arrived; leave the rest its last moment."""
        # Before uvicorn cancels what is left, as if it were a fault: who does not read is no fault.
        self.loop.call_later(LAST_SECONDS, self.transport.abort)
        if self._arrives():
            self._refuse(ShuttingDown())
        else:
            super().shutdown()

    # What the parser has read.

    def on_message_begin(self) -> None:
        """Begin a request."""
        self._wait()
        self._in_head = True
        self._fields = self._head = self._discarded = 0
        super().on_message_begin()

    def on_url(self, url: bytes) -> None:
        """Count a part of the target."""
        self._count(len(url))
        super().on_url(url)

    def on_header(self, name: bytes, value: bytes) -> None:
        """Count a header field, or a trailer."""
        self._fields += 1
        self._count(len(name) + len(value))
        super().on_header(name, value)

    def on_headers_complete(self) -> None:
        """Hand the request over, if its target is a path."""
        self._unread = 0
        if not self.url.startswith(b"/"):
            self._fault = HttpError(
                400,
                "the request's target is no path, and might name another host than Host does: "
                "send a path",
                "TARGET_NOT_A_PATH",
            )
            raise self._fault  # As in `_count`.
        super().on_headers_complete()
        self._in_head = False
        if self.parser.should_upgrade():
            self.cycle.keep_alive = False  # Nothing behind it would be read as HTTP.

    def on_body(self, body: bytes) -> None:
        """Hand a part of the body over, or throw it away after the answer."""
        self._unread = 0
        if self.cycle.response_complete:
            self._discarded += len(body)
            if self._discarded > MOST_DISCARDED:
                self.transport.close()
        super().on_body(body)

    def on_message_complete(self) -> None:
        """End a request; what follows is the server's time."""
        self._unread = 0
        self._rest()
        super().on_message_complete()

    def _count(self, size: int) -> None:
        self._unread = 0
        self._head += size
        if self._fields > MOST_FIELDS or self._head > MOST_HEAD_BYTES:
            self._fault = _too_large()
            raise self._fault  # To the parser, which tells `data_received`.

    # Room.

    def _make_room(self) -> None:
        """End the connection that has waited longest for a request; if all are busy, this one.

        Or who opens connections and sends nothing would keep out everybody else, probes too.
        """
        waiting = [
            each
            for each in self.connections
            if isinstance(each, BoundedProtocol) and each is not self and each._waits()
        ]
        # What has sent a head comes last: it may be a large adapter, on its way.
        oldest = min(waiting, key=lambda each: (each._runs(), each._began), default=self)
        if oldest is self or oldest._arrives():
            oldest._refuse(
                HttpError(
                    503,
                    f"{MOST_CONNECTIONS} connections are open already: retry in a second",
                    "TOO_MANY_CONNECTIONS",
                )
            )
        else:
            oldest.transport.close()

    def _waits(self) -> bool:
        """Return whether the client is to send something next."""
        waits = self._timer is not None or not self._runs()
        return waits and not self._refused and not self.transport.is_closing()

    def _arrives(self) -> bool:
        """Return whether a part of a request is here."""
        return self._timer is not None and self._arrived > 0

    # Time.

    def _wait(self) -> None:
        self._rest()
        self._began, self._arrived = self.loop.time(), 0
        self._timer = self.loop.call_later(PATIENCE_SECONDS, self._check)

    def _rest(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _check(self) -> None:
        """Refuse a request that does not arrive, unless it is the server that does not read."""
        if self.flow.read_paused:
            self._wait()
            return
        left = self._began + PATIENCE_SECONDS + self._arrived / SLOWEST_BYTES - self.loop.time()
        if left > 0:
            self._timer = self.loop.call_later(left, self._check)
            return
        self._timer = None
        self._refuse(
            HttpError(
                408,
                f"the request did not arrive within {PATIENCE_SECONDS:g} s and "
                f"{SLOWEST_BYTES} bytes a second: send it faster",
                "REQUEST_TOO_SLOW",
            )
        )

    # The end.

    def _refuse(self, error: ServerError) -> None:
        """Answer with an error where an answer is due, and end the connection."""
        if self._refused or self.transport.is_closing():
            return
        self._refused = True
        self._rest()
        if not self._answer_is_due():
            self.transport.close()
            return
        status, told, _ = to_answer(error)
        body = to_json(told).encode()
        self.transport.write(
            STATUS_LINE[status]
            + b"content-type: application/json\r\nconnection: close\r\n"
            + b"content-length: %d\r\n\r\n" % len(body)
            + body
        )
        if self.cycle is not None:
            self.cycle.disconnected = True  # Nothing more is sent.
            self.cycle.message_event.set()
        self.flow.resume_reading()
        if self.transport.can_write_eof():
            self.transport.write_eof()
        self.loop.call_later(LINGER_SECONDS, self.transport.close)

    def _answer_is_due(self) -> bool:
        """Return whether the client reads next what is sent next, as the answer to this."""
        if self._in_head:
            return not self._runs()
        return self._runs() and not self.cycle.response_started and not self.pipeline

    def _runs(self) -> bool:
        """Return whether a request is still to be answered, or to be answered to its end."""
        return self.cycle is not None and not self.cycle.response_complete


def _too_large() -> HttpError:
    return HttpError(
        431,
        f"the request's head is too large: send at most {MOST_FIELDS} header fields and "
        f"{MOST_HEAD_BYTES} bytes",
        "HEAD_TOO_LARGE",
    )

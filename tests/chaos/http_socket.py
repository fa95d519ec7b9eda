"""HTTP as bytes on a socket: what a client library would never send, and whatever comes back."""

from __future__ import annotations

import json
import re
import socket
from dataclasses import dataclass
from typing import Any

PATIENCE = 30.0
_LENGTH = re.compile(rb"content-length: ([0-9]+)", re.I)
LONGEST_ANSWER = 1 << 22


@dataclass(frozen=True)
class Reply:
    """What came back: status (0: nothing that is an answer), head in lower case, body."""

    status: int
    head: str
    body: bytes

    @property
    def error(self) -> dict[str, Any] | None:
        """The error that the answer is, or that its last event is."""
        events = [
            part.rpartition(b"data: ")[2] for part in self.body.split(b"\n\n") if part.strip()
        ]
        for part in reversed(events or [self.body]):
            try:
                found = json.loads(part)
            except ValueError:
                continue
            if isinstance(found, dict) and isinstance(found.get("error"), dict):
                error: dict[str, Any] = found["error"]
                return error
        return None


def connect(address: str, timeout: float = PATIENCE) -> socket.socket:
    """Return a socket that is connected to HOST:PORT."""
    host, _, port = address.rpartition(":")
    return socket.create_connection((host, int(port)), timeout)


def exchange(address: str, request: bytes, *, whole: bool, endless: bool = False) -> Reply:
    """Send bytes on a connection of their own, and read what comes.

    Args:
        address: HOST:PORT.
        request: What is sent.
        whole: Whether it surely is a whole request; else nothing may come of it until this side is
            closed, since the server waits for the rest.
        endless: Whether the answer is a stream without an end, of which the first event will do.

    Raises:
        TimeoutError: Nothing came for half a minute.
    """
    got = b""
    with connect(address) as connection:
        try:
            connection.sendall(request)
            connection.settimeout(PATIENCE if whole else 0.2)
            while len(got) < LONGEST_ANSWER:
                try:
                    part = connection.recv(1 << 16)
                except TimeoutError:
                    if whole:
                        raise
                    whole = True
                    connection.settimeout(PATIENCE)
                    connection.shutdown(socket.SHUT_WR)
                    continue
                got += part
                if not part or _is_whole(got) or (endless and b"\n\n" in _body(got)):
                    break
        except (ConnectionError, BrokenPipeError):
            pass  # The server has ended it, with or without an answer before.
    head, _, body = got.partition(b"\r\n\r\n")
    words = head.split(None, 2)
    is_answer = len(words) > 1 and words[0] == b"HTTP/1.1" and words[1].isdigit()
    if b"transfer-encoding: chunked" in head.lower():
        body = _joined(body)
    return Reply(int(words[1]) if is_answer else 0, head.decode("latin-1").lower(), body)


def _body(answer: bytes) -> bytes:
    return answer.partition(b"\r\n\r\n")[2]


def _is_whole(answer: bytes) -> bool:
    length = _LENGTH.search(answer.partition(b"\r\n\r\n")[0])
    return length is not None and len(_body(answer)) >= int(length[1])


def _joined(chunks: bytes) -> bytes:
    """Return what chunks hold, as far as they go."""
    body = b""
    while chunks:
        size, _, chunks = chunks.partition(b"\r\n")
        try:
            length = int(size, 16)
        except ValueError:
            break
        body, chunks = body + chunks[:length], chunks[length + 2 :]
    return body

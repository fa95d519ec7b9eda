"""What a connection may hold and how long it may take, seen from raw sockets."""

from __future__ import annotations

import asyncio
import json
import socket
import threading
from collections.abc import AsyncIterator, Iterator
from http.client import HTTPConnection
from typing import Any

import pytest
from starlette.requests import ClientDisconnect, Request
from starlette.responses import PlainTextResponse, Response, StreamingResponse
from starlette.types import Receive, Scope, Send
from uvicorn import Config
from uvicorn.server import ServerState

from superpose_server.door.http import protocol
from superpose_server.door.http.protocol import BoundedProtocol

PATIENCE = 60.0
GET = b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n"
POST = b"POST / HTTP/1.1\r\nHost: localhost\r\n"


async def application(scope: Scope, receive: Receive, send: Send) -> None:
    """Answer with the length of the body; at once, or never, where the path says so."""
    request = Request(scope, receive)
    response: Response
    try:
        if scope["path"] == "/unread":
            response = PlainTextResponse("not read", 413)
        elif scope["path"] == "/endless":
            response = StreamingResponse(endless())
        else:
            response = PlainTextResponse(str(len(await request.body())))
    except ClientDisconnect:
        return
    await response(scope, receive, send)


async def endless() -> AsyncIterator[bytes]:
    yield b"begun"
    await asyncio.Event().wait()


class Listening:
    """The protocol on a free port, and how many of its requests and connections are left."""

    def __init__(self) -> None:
        self.state = ServerState()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()
        self.config = config = Config(
            application, http=BoundedProtocol, ws="none", lifespan="off", log_config=None
        )
        config.load()

        async def listen() -> asyncio.Server:
            return await asyncio.get_running_loop().create_server(
                lambda: BoundedProtocol(config=config, server_state=self.state, app_state={}),
                "127.0.0.1",
                0,
            )

        self._server = asyncio.run_coroutine_threadsafe(listen(), self._loop).result(PATIENCE)
        self.address = self._server.sockets[0].getsockname()

    def connect(self) -> socket.socket:
        return socket.create_connection(self.address, PATIENCE)

    def client(self) -> HTTPConnection:
        host, port = self.address
        return HTTPConnection(host, port, timeout=PATIENCE)

    def wait_for(self, arrived: int) -> None:
        """Wait until so much has arrived on all connections together."""

        async def wait() -> None:
            connections: set[Any] = self.state.connections
            while sum(each._arrived for each in connections) < arrived:
                await asyncio.sleep(0)

        asyncio.run_coroutine_threadsafe(wait(), self._loop).result(PATIENCE)

    def shut_down(self, arrived: int) -> None:
        """Do to the one connection what uvicorn does at its end, once so much has arrived."""

        async def shut_down() -> None:
            connections: set[Any] = self.state.connections
            while sum(each._arrived for each in connections) < arrived or not connections:
                await asyncio.sleep(0)
            (connection,) = connections
            connection.shutdown()

        asyncio.run_coroutine_threadsafe(shut_down(), self._loop).result(PATIENCE)

    def close(self) -> None:
        async def end() -> None:
            self._server.close()
            for connection in list(self.state.connections):
                connection.transport.abort()
            for task in list(self.state.tasks):
                task.cancel()
            await asyncio.gather(*self.state.tasks, return_exceptions=True)

        asyncio.run_coroutine_threadsafe(end(), self._loop).result(PATIENCE)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(PATIENCE)
        self._loop.close()


@pytest.fixture
def listening() -> Iterator[Listening]:
    server = Listening()
    try:
        yield server
        check_serving(server)  # Whatever was sent.
    finally:
        server.close()


def check_serving(server: Listening) -> None:
    client = server.client()
    for body in (b"", b"abc"):
        client.request("POST", "/", body)
        assert client.getresponse().read() == str(len(body)).encode()
    client.close()


def exchange(server: Listening, *parts: bytes) -> bytes:
    """Send, and return everything until the server ends the connection."""
    with server.connect() as connection:
        for part in parts:
            connection.sendall(part)
        return read_to_end(connection)


def read_to_end(connection: socket.socket) -> bytes:
    answer = b""
    while part := connection.recv(1 << 16):
        answer += part
    return answer


def refusal(answer: bytes) -> tuple[int, str]:
    """Return the status and the reason of the one answer that there is."""
    head, _, body = answer.partition(b"\r\n\r\n")
    assert b"connection: close" in head
    assert answer.count(b"\r\n\r\n") == 1
    return int(head.split()[1]), json.loads(body)["error"]["code"]


MALFORMED = {
    "no HTTP": b"GARBAGE\r\n\r\n",
    "TLS": b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
    "HTTP/2": b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    "a target that is not ASCII": b"GET /\xff HTTP/1.1\r\nHost: a\r\n\r\n",
    "lines that end in LF": b"GET / HTTP/1.1\nHost: a\n\n",
    "a field with NUL": b"GET / HTTP/1.1\r\nA: b\x00c\r\n\r\n",
    "a field with a space in its name": b"GET / HTTP/1.1\r\nHost : a\r\n\r\n",
    "two lengths": POST + b"Content-Length: 1\r\nContent-Length: 2\r\n\r\n",
    "a length and chunks": POST + b"Content-Length: 1\r\nTransfer-Encoding: chunked\r\n\r\n",
    "a negative length": POST + b"Content-Length: -1\r\n\r\n",
    "a length of 100 digits": POST + b"Content-Length: " + b"9" * 100 + b"\r\n\r\n",
    "a chunk of no size": POST + b"Transfer-Encoding: chunked\r\n\r\nxyz\r\n",
}


@pytest.mark.parametrize("name", MALFORMED)
def test_what_is_no_http_gets_one_answer_and_the_end(listening: Listening, name: str) -> None:
    assert refusal(exchange(listening, MALFORMED[name])) == (400, "REQUEST_MALFORMED")


@pytest.mark.parametrize(
    "target",
    [
        *(b"GET http://evil.example/", b"GET http://localhost/", b"POST evil.example:80"),
        *(b"CONNECT evil.example:443", b"OPTIONS *"),
    ],
)
def test_only_host_says_which_host_is_meant(listening: Listening, target: bytes) -> None:
    answer = exchange(listening, target + b" HTTP/1.1\r\nHost: localhost\r\n\r\n")
    assert refusal(answer)[0] == 400
    if b":80" not in target:  # Which is no target at all.
        assert refusal(answer)[1] == "TARGET_NOT_A_PATH"


TOO_LARGE = {
    "10,000 fields": b"GET / HTTP/1.1\r\n" + b"X: y\r\n" * 10_000 + b"\r\n",
    "one field more than may be": b"GET / HTTP/1.1\r\n" + b"X: y\r\n" * 101 + b"\r\n",
    "large fields": b"GET / HTTP/1.1\r\n" + (b"X: " + b"y" * 1000 + b"\r\n") * 70 + b"\r\n",
    "a long target": b"GET /" + b"x" * 70_000 + b" HTTP/1.1\r\n\r\n",
    "10,000 trailers": POST
    + b"Transfer-Encoding: chunked\r\n\r\n0\r\n"
    + b"X: y\r\n" * 10_000
    + b"\r\n",
}


@pytest.mark.parametrize("name", TOO_LARGE)
def test_a_head_that_is_too_large_is_refused(listening: Listening, name: str) -> None:
    assert refusal(exchange(listening, TOO_LARGE[name])) == (431, "HEAD_TOO_LARGE")


def test_as_many_fields_as_may_be_are_read(listening: Listening) -> None:
    end = b"Connection: close\r\n\r\n"
    answer = exchange(listening, b"GET / HTTP/1.1\r\n" + b"X: y\r\n" * 99 + end)
    assert answer.startswith(b"HTTP/1.1 200")


@pytest.mark.parametrize(
    "begin",
    [
        b"GET / HTTP/1.1\r\nX: ",
        b"GET / HTTP/1.1\r\n",  # and a name
        b"GET /",
        POST + b"Transfer-Encoding: chunked\r\n\r\n1;",  # an extension
        POST + b"Transfer-Encoding: chunked\r\n\r\n0\r\nX: ",
        b"",
    ],
)
def test_what_never_ends_is_not_kept(listening: Listening, begin: bytes) -> None:
    more = b"x" * (1 << 16) if begin else b"\r\n" * (1 << 15)
    with listening.connect() as connection:
        connection.sendall(begin)
        with pytest.raises(ConnectionError):  # noqa: PT012  # whenever it is told
            while True:
                connection.sendall(more)


@pytest.fixture(autouse=True)
def short_linger(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(protocol, "LINGER_SECONDS", 0.05)


@pytest.fixture
def hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(protocol, "PATIENCE_SECONDS", 0.05)


@pytest.mark.usefixtures("hasty")
@pytest.mark.parametrize(
    "begin",
    [
        b"",
        b"\r\n",
        b"GET / HT",
        b"GET / HTTP/1.1\r\nHost: localhost\r\n",
        POST + b"Content-Length: 10\r\n\r\n12345",
        POST + b"Transfer-Encoding: chunked\r\n\r\n5\r\n12345\r\n",
    ],
)
def test_what_does_not_arrive_is_not_waited_for(listening: Listening, begin: bytes) -> None:
    assert refusal(exchange(listening, begin)) == (408, "REQUEST_TOO_SLOW")


@pytest.mark.usefixtures("hasty")
def test_a_sender_that_drips_gains_no_time(
    listening: Listening, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(protocol, "SLOWEST_BYTES", 1 << 40)  # To which anything is a drip.
    with listening.connect() as connection:
        connection.sendall(POST + b"Content-Length: 1000000000\r\n\r\n")
        with pytest.raises(ConnectionError):  # noqa: PT012  # whenever it is told
            for _ in range(1_000_000_000):
                connection.sendall(b"x")


@pytest.mark.usefixtures("hasty")
def test_a_sender_that_keeps_pace_gets_the_time_for_it(
    listening: Listening, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(protocol, "SLOWEST_BYTES", 1)
    with listening.connect() as connection:
        connection.sendall(POST + b"Content-Length: 6\r\n\r\n12345")
        # Others that began later are ended meanwhile.
        assert refusal(exchange(listening, b"")) == (408, "REQUEST_TOO_SLOW")
        connection.sendall(b"6")
        assert connection.recv(1 << 16).startswith(b"HTTP/1.1 200")


@pytest.mark.usefixtures("hasty")
def test_after_a_request_the_time_is_the_servers_own(listening: Listening) -> None:
    """A stream that says nothing for longer than a request may take goes on."""
    with listening.connect() as stream:
        stream.sendall(GET.replace(b"/", b"/endless", 1))
        while b"begun" not in stream.recv(1 << 16):
            pass
        stream.sendall(b"\r\n")  # As old clients do behind a body.
        # Another connection that is ended for its slowness began later than this one.
        refusal(exchange(listening, b"GET"))
        stream.setblocking(False)
        with pytest.raises(BlockingIOError):
            stream.recv(1)


def test_garbage_behind_a_request_ends_the_connection_without_an_answer_of_its_own(
    listening: Listening,
) -> None:
    answer = exchange(listening, GET.replace(b"/", b"/endless", 1) + b"\x00garbage")
    assert answer.count(b"HTTP/1.1") <= 1
    assert b"400" not in answer
    answered = exchange(listening, GET + GET + GET.replace(b"GET", b"G3T"))
    assert b"REQUEST_MALFORMED" not in answered or answered.endswith(b"}}")


@pytest.mark.parametrize("data", [b"", b"GET / HT", GET, POST + b"Content-Length: 10\r\n\r\n12345"])
def test_a_half_closed_connection_is_ended(listening: Listening, data: bytes) -> None:
    with listening.connect() as connection:
        connection.sendall(data)
        connection.shutdown(socket.SHUT_WR)
        assert b" 500 " not in read_to_end(connection)


@pytest.mark.parametrize("size", [10 << 20, 200 << 20])
def test_a_body_that_was_refused_unread_is_thrown_away_up_to_a_bound(
    listening: Listening, size: int
) -> None:
    with listening.connect() as connection:
        head = b"POST /unread HTTP/1.1\r\nHost: localhost\r\nContent-Length: %d\r\n\r\n" % size
        connection.sendall(head)
        part = bytes(1 << 20)
        if size > protocol.MOST_DISCARDED:
            with pytest.raises(ConnectionError):  # noqa: PT012  # whenever it is told
                for _ in range(size >> 20):
                    connection.sendall(part)
        else:
            for _ in range(size >> 20):
                connection.sendall(part)
            assert b"413" in connection.recv(1 << 16)
            connection.sendall(GET)  # The connection is as good as before.
            assert connection.recv(1 << 16).startswith(b"HTTP/1.1 200")


def test_an_upgrade_is_answered_as_a_request_and_nothing_behind_it_is_read(
    listening: Listening,
) -> None:
    upgrade = b"GET / HTTP/1.1\r\nHost: a\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n"
    answer = exchange(listening, upgrade + GET)
    assert answer.startswith(b"HTTP/1.1 200")
    assert answer.count(b"\r\n\r\n") == 1


def test_one_connection_too_many_is_told_so_if_all_are_busy(
    listening: Listening, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(protocol, "MOST_CONNECTIONS", 2)
    with listening.connect() as first, listening.connect() as second:
        for busy in (first, second):
            busy.sendall(GET.replace(b"/", b"/endless", 1))
            assert busy.recv(1, socket.MSG_PEEK)
        assert refusal(exchange(listening)) == (503, "TOO_MANY_CONNECTIONS")
        for busy in (first, second):
            assert busy.recv(1 << 16)
    monkeypatch.undo()


@pytest.mark.parametrize(
    ("sent", "reason"),
    [
        (b"", None),
        (GET, None),
        (b"GET / HT", "TOO_MANY_CONNECTIONS"),
        (POST + b"Content-Length: 10\r\n\r\n12345", "TOO_MANY_CONNECTIONS"),
    ],
    ids=["silent", "idle", "head", "body"],
)
def test_who_has_waited_longest_makes_room_for_one_more(
    listening: Listening, sent: bytes, reason: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(protocol, "MOST_CONNECTIONS", 2)
    with listening.connect() as longest, listening.connect() as busy:
        longest.sendall(sent)
        listening.wait_for(len(sent))
        busy.sendall(GET.replace(b"/", b"/endless", 1))
        assert busy.recv(1, socket.MSG_PEEK)
        with listening.connect() as newest:
            newest.sendall(GET)
            assert newest.recv(12) == b"HTTP/1.1 200"
        answer = read_to_end(longest)
        assert busy.recv(1 << 16)
    if reason is None:
        assert b" 503 " not in answer
    else:
        assert refusal(answer) == (503, reason)
    monkeypatch.undo()


@pytest.mark.parametrize(
    ("sent", "reason"),
    [
        (b"", None),
        (GET, None),
        (GET.replace(b"/", b"/endless", 1), None),
        (b"GET / HT", "SHUTTING_DOWN"),
        (POST + b"Content-Length: 10\r\n\r\n12345", "SHUTTING_DOWN"),
    ],
)
def test_at_the_end_of_the_server_every_connection_is_ended(
    listening: Listening, sent: bytes, reason: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(protocol, "LAST_SECONDS", 0.05)
    with listening.connect() as connection:
        connection.sendall(sent)
        if sent.endswith(b"\r\n\r\n"):
            assert connection.recv(1, socket.MSG_PEEK)  # It has an answer, or the first of it.
        listening.shut_down(len(sent))
        answer = read_to_end(connection)
        if reason is None:
            assert b" 503 " not in answer
        else:
            assert refusal(answer) == (503, reason)


def test_idle_keep_alive_connections_are_closed(listening: Listening) -> None:
    usual, listening.config.timeout_keep_alive = listening.config.timeout_keep_alive, 0
    with listening.connect() as connection:
        connection.sendall(GET)
        assert read_to_end(connection).startswith(b"HTTP/1.1 200")
    listening.config.timeout_keep_alive = usual

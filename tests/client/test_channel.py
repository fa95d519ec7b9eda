"""How clients reach their server: after it was away, past a proxy, through one, or not at all."""

import asyncio
import copy
import pickle
import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tests.client.callers import AsyncCaller, Caller, SyncCaller
from tests.client.fake_server import FakeServer, Hang

from superpose_client import errors
from superpose_client.async_client import AsyncClient
from superpose_client.channel import proxy_of
from superpose_client.client import Client

CALLERS = pytest.mark.parametrize("make", [SyncCaller, AsyncCaller], ids=["sync", "async"])
Made = Callable[..., Caller]


class Turnstile:
    """In the place of a server: takes connections, hangs up, and counts them."""

    def __init__(self, path: Path) -> None:
        self.turned_away = 0
        self._path = path
        self._ending = False
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(str(path))
        self._listener.listen()
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        while True:
            connection, _ = self._listener.accept()
            connection.close()
            self.turned_away += 1
            if self._ending:
                self._listener.close()
                return

    def end(self) -> None:
        """Let the path be another's."""
        self._ending = True
        with socket.socket(socket.AF_UNIX) as last:
            last.connect(str(self._path))
        self._thread.join()
        self._path.unlink()


@CALLERS
def test_a_server_that_returns_is_found_at_once(make: Made, tmp_path: Path) -> None:
    path = tmp_path / "s"
    turnstile = Turnstile(path)
    client = make(f"unix:{path}", timeout=10, retries=0)
    while turnstile.turned_away < 5:
        with pytest.raises(errors.UnavailableError):
            client.mix()
    turnstile.end()
    with FakeServer(path):
        back = time.monotonic()
        new = make(f"unix:{path}", timeout=10, retries=0)
        new.mix()  # It has no part in what the other went through.
        assert time.monotonic() - back < 0.5
        new.close()
        while True:
            try:
                client.mix()
            except errors.UnavailableError:
                assert time.monotonic() - back < 2
            else:
                break
    client.close()


PROXY = "http://name:word@10.0.0.1:3128"


@pytest.mark.parametrize(
    ("target", "variables", "variable"),
    [
        ("model.example:50051", {"http_proxy": PROXY}, "http_proxy"),
        ("model.example:50051", {"http_proxy": PROXY, "https_proxy": PROXY}, "https_proxy"),
        ("model.example:50051", {"http_proxy": PROXY, "grpc_proxy": PROXY}, "grpc_proxy"),
        ("dns:///model.example:50051", {"http_proxy": PROXY}, "http_proxy"),
        ("192.0.2.1:50051", {"http_proxy": PROXY}, "http_proxy"),
        ("[2001:db8::1]:50051", {"http_proxy": PROXY}, "http_proxy"),
        ("localhost.example:50051", {"http_proxy": PROXY}, "http_proxy"),
        ("model.example:50051", {"http_proxy": PROXY, "no_proxy": "other.example"}, "http_proxy"),
        ("model.example:50051", {"http_proxy": PROXY, "no_proxy": "a, model.example"}, None),
        ("model.example:50051", {"http_proxy": PROXY, "no_proxy": ".example"}, None),
        ("192.0.2.1:50051", {"http_proxy": PROXY, "no_proxy": "192.0.2.0/24"}, None),
        ("model.example:50051", {}, None),
        ("model.example:50051", {"HTTP_PROXY": PROXY}, None),
        ("127.0.0.1:50051", {"http_proxy": PROXY}, None),
        ("127.8.9.10:50051", {"http_proxy": PROXY}, None),
        ("0.0.0.0:50051", {"http_proxy": PROXY}, None),
        ("localhost:50051", {"http_proxy": PROXY}, None),
        ("dns:///LOCALHOST:50051", {"http_proxy": PROXY}, None),
        ("dns:localhost:50051", {"http_proxy": PROXY}, None),
        ("[::1]:50051", {"http_proxy": PROXY}, None),
        ("::1", {"http_proxy": PROXY}, None),
        ("ipv4:127.0.0.1:50051", {"http_proxy": PROXY}, None),
        ("ipv6:[::1]:50051", {"http_proxy": PROXY}, None),
        ("unix:/run/superpose.sock", {"http_proxy": PROXY}, None),
    ],
)
def test_the_proxy_is_that_of_grpc_and_never_one_for_this_machine(
    target: str, variables: dict[str, str], variable: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("grpc_proxy", "https_proxy", "http_proxy", "no_grpc_proxy", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    named = None if variable is None else f"the proxy 10.0.0.1:3128 of {variable}"
    assert proxy_of(target) == named


@CALLERS
def test_a_proxy_that_is_in_the_way_is_named(make: Made, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{closed.getsockname()[1]}"
        for name in ("grpc_proxy", "https_proxy", "no_grpc_proxy", "no_proxy"):
            monkeypatch.delenv(name, raising=False)
        monkeypatch.setenv("http_proxy", f"http://name:word@{address}")
        client = make("192.0.2.1:50051", timeout=20, retries=0)
        with pytest.raises(errors.UnavailableError) as caught:
            client.mix()
        client.close()
    assert caught.value.message.endswith(f"; by way of the proxy {address} of http_proxy")
    assert "word" not in caught.value.message


def test_a_closed_client_says_so(server: FakeServer) -> None:
    client = Client(server.address)
    client.close()
    client.close()
    for call in (client.mix, lambda: client.stream("x"), lambda: client.score(["x"])):
        with pytest.raises(
            errors.ClientClosedError, match=r"^the client is closed: make a new one$"
        ):
            call()
    assert server.requests == []


def test_a_client_that_is_closed_within_a_call_stays_closed(server: FakeServer) -> None:
    client = Client(server.address)
    client.close()
    for connection in client._connections.all:
        connection.renew()
    with pytest.raises(errors.ClientClosedError):
        client.mix()
    assert server.requests == []


def test_a_closed_asyncio_client_says_so(server: FakeServer) -> None:
    async def use() -> None:
        client = AsyncClient(server.address)
        await client.close()
        await client.close()
        with pytest.raises(
            errors.ClientClosedError, match=r"^the client is closed: make a new one$"
        ):
            await client.mix()
        with pytest.raises(errors.ClientClosedError):
            client.stream("x")

    asyncio.run(use())
    assert server.requests == []


def test_closing_an_asyncio_client_cancels_its_calls_and_not_their_tasks(
    server: FakeServer,
) -> None:
    server.answers["GetMix"] = Hang()

    async def use() -> None:
        client = AsyncClient(server.address)
        running = asyncio.ensure_future(client.mix())
        while not server.requests:
            await asyncio.sleep(0)
        await client.close()
        with pytest.raises(errors.RequestCancelledError, match="the call was cancelled"):
            await running

    asyncio.run(use())


@pytest.mark.parametrize("send", [pickle.dumps, copy.copy, copy.deepcopy])
def test_a_connection_is_not_sent_elsewhere(send: Callable[[Any], Any], server: FakeServer) -> None:
    with Client(server.address) as client:
        for connected in (client, client.stream("x")):
            with pytest.raises(errors.NotPicklableError, match="make a client where it is used"):
                send(connected)
            with pytest.raises(TypeError):
                send(connected)

    async def use() -> None:
        async with AsyncClient(server.address) as client:
            for connected in (client, client.stream("x")):
                with pytest.raises(errors.NotPicklableError):
                    send(connected)

    asyncio.run(use())

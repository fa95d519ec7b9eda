from collections.abc import Iterator

import pytest
from tests.client.callers import AsyncCaller, Caller, SyncCaller
from tests.client.fake_server import FakeServer


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeServer]:
    # No proxy is asked for what runs on this machine.
    monkeypatch.setenv("http_proxy", "http://proxy.invalid:1")
    with FakeServer() as fake:
        yield fake


@pytest.fixture(params=[SyncCaller, AsyncCaller], ids=["sync", "async"])
def caller(request: pytest.FixtureRequest, server: FakeServer) -> Iterator[Caller]:
    made = request.param(server.address)
    yield made
    made.close()

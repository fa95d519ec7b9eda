from collections.abc import Iterator

import pytest
from tests.client.callers import AsyncCaller, Caller, SyncCaller
from tests.client.fake_server import FakeServer


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeServer]:
    for name in ("http_proxy", "https_proxy", "grpc_proxy"):
        monkeypatch.delenv(name, raising=False)
    with FakeServer() as fake:
        yield fake


@pytest.fixture(params=[SyncCaller, AsyncCaller], ids=["sync", "async"])
def caller(request: pytest.FixtureRequest, server: FakeServer) -> Iterator[Caller]:
    made = request.param(server.address)
    yield made
    made.close()

from collections.abc import Iterator

import pytest
from tests.client.adapterctl import Ctl
from tests.client.callers import AsyncCaller, Caller, SyncCaller
from tests.client.fake_server import FakeServer
from typer.testing import CliRunner, Result

from superpose_client.cli import app


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


@pytest.fixture(autouse=True)
def plain_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("FORCE_COLOR", "NO_COLOR", "COLUMNS", "SUPERPOSE_SERVER", "TTY_COMPATIBLE"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def ctl(server: FakeServer) -> Ctl:
    """Runs adapterctl against the fake server."""

    def run(*arguments: str, stdin: str | bytes | None = None) -> Result:
        result = CliRunner().invoke(app, ["--server", server.address, *arguments], input=stdin)
        if result.exception is not None and not isinstance(result.exception, SystemExit):
            raise result.exception
        assert "\x1b" not in result.stdout + result.stderr
        return result

    return run

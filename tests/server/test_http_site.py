"""Which requests a page of another site may have sent, by their header fields alone."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest
from starlette.responses import PlainTextResponse
from starlette.types import Message

from superpose_server.door.http.calls import Calls
from superpose_server.door.http.site import SiteGuard

HOSTS = ("box.example", "10.0.0.7")
ORIGINS = ("https://chat.example",)


def ask(
    *headers: tuple[str, str],
    path: str = "/v1/models",
    version: str = "1.1",
    server: tuple[str, int] | None = ("192.168.1.5", 8000),
) -> tuple[int, str | None]:
    """Return the status of a guarded request, and the reason of a refusal."""
    sent: list[Message] = []

    async def receive() -> Message:
        return {"type": "http.request"}

    async def send(message: Message) -> None:
        sent.append(message)

    scope: dict[str, Any] = {
        "type": "http",
        "http_version": version,
        "method": "GET",
        "path": path,
        "server": server,
        "state": {},
        "headers": [(name.lower().encode(), value.encode()) for name, value in headers],
    }
    guard = Calls(SiteGuard(PlainTextResponse("served"), HOSTS, ORIGINS), lambda reason: None)
    asyncio.run(guard(scope, receive, send))
    body = b"".join(message.get("body", b"") for message in sent)
    status = sent[0]["status"]
    return status, None if status == 200 else json.loads(body)["error"]["code"]


@pytest.mark.parametrize(
    "host",
    [
        "localhost",
        "localhost:8000",
        "LOCALHOST:1",
        "localhost.:8000",
        "127.0.0.1:8000",
        "127.1.2.3",
        "[::1]:8000",
        "192.168.1.5:8000",  # what was connected to
        "box.example",
        "Box.Example:443",
        "10.0.0.7:8000",
    ],
)
def test_names_of_this_server_are_answered(host: str) -> None:
    assert ask(("Host", host)) == (200, None)


@pytest.mark.parametrize(
    "host",
    [
        "evil.example",
        "evil.example:8000",
        "localhost.evil.example",
        "evillocalhost",
        "box.example.evil",
        "0.0.0.0:8000",
        "192.168.1.6",
        "[::2]",
        "::1",
        "[127.0.0.1",
        "127.0.0.1:8000:1",
        "localhost:port",
        "user@localhost",
        "localhost/",
        "localhost evil.example",
        "2130706433",
        "",
    ],
)
def test_other_names_are_misdirected(host: str) -> None:
    assert ask(("Host", host)) == (421, "HOST_NOT_ALLOWED")


def test_no_host_and_several_hosts_are_refused() -> None:
    assert ask() == (421, "HOST_NOT_ALLOWED")
    assert ask(("Host", "localhost"), ("Host", "evil.example")) == (400, "HEADER_REPEATED")
    assert ask(("Host", "192.168.1.5"), server=None) == (421, "HOST_NOT_ALLOWED")


@pytest.mark.parametrize(
    ("host", "origin"),
    [
        ("localhost:8000", "http://localhost:8000"),
        ("LocalHost:8000", "http://localhost:8000"),
        ("[::1]:8000", "http://[::1]:8000"),
        ("box.example", "https://box.example"),  # behind a proxy that ends TLS
        ("localhost:8000", "https://chat.example"),
    ],
)
def test_pages_of_this_server_and_of_sites_that_are_named_may_ask(host: str, origin: str) -> None:
    assert ask(("Host", host), ("Origin", origin)) == (200, None)


@pytest.mark.parametrize(
    "origin",
    [
        "null",
        "",
        "http://evil.example",
        "http://localhost",
        "http://localhost:3000",
        "http://127.0.0.1:8000",
        "http://localhost:8000.evil.example",
        "http://chat.example",
        "https://chat.example:8443",
        "https://chat.example.evil",
        "file://",
    ],
)
def test_pages_of_other_sites_may_not(origin: str) -> None:
    assert ask(("Host", "localhost:8000"), ("Origin", origin)) == (403, "ORIGIN_NOT_ALLOWED")


def test_a_second_origin_hides_nothing() -> None:
    own, foreign = ("Origin", "http://localhost:8000"), ("Origin", "http://evil.example")
    assert ask(("Host", "localhost:8000"), own, foreign) == (400, "HEADER_REPEATED")


def test_two_ids_of_a_request_are_refused() -> None:
    twice = ("X-Request-Id", "a"), ("X-Request-Id", "b")
    assert ask(("Host", "localhost"), *twice) == (400, "HEADER_REPEATED")


def test_http_1_0_is_refused_for_it_needs_no_host() -> None:
    assert ask(("Host", "localhost"), version="1.0") == (505, "HTTP_VERSION_NOT_SUPPORTED")


@pytest.mark.parametrize("path", ["/healthz", "/readyz"])
def test_probes_come_by_any_name_and_version(path: str) -> None:
    assert ask(("Host", "10.1.2.3:80"), path=path) == (200, None)
    assert ask(path=path, version="1.0") == (200, None)
    assert ask(path=path + "/x") == (421, "HOST_NOT_ALLOWED")

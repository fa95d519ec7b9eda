"""Hostile requests over HTTP are refused or ended, change nothing, and the server goes on."""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator
from contextlib import closing

import pytest
from tests.integration.harness import PATIENCE, Family, LoopThread, Served, start, wait_until
from tests.integration.http_client import JSON, Http

from superpose_server.door.http import protocol

SITE = "https://chat.example"
SET = ("PUT", "/v1/mix")


@pytest.fixture(scope="module")
def server(
    loop: LoopThread, gpt2: Family, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Served]:
    served = start(
        loop,
        gpt2.base,
        tmp_path_factory.mktemp("hostile") / "state",
        http_listen="127.0.0.1:0",
        http_host=("box.example",),
        cors_origin=(SITE,),
    )
    gpt2.push_all(served.client)
    served.client.set("a")
    before = served.fingerprint()
    yield served
    assert served.fingerprint() == before
    served.stop()


@pytest.fixture
def http(server: Served, caplog: pytest.LogCaptureFixture) -> Iterator[Http]:
    """A client; whatever a test sends, the server serves as before, and nothing was its fault."""
    before = server.client.mix(), server.client.adapters()
    http = Http(server.server.http_address)
    yield http
    assert http.ask("GET", "/v1/mix").status == 200
    assert (server.client.mix(), server.client.adapters()) == before
    faults = [record for record in caplog.get_records("call") if record.levelname == "ERROR"]
    assert faults == []


# Pages of other sites.


@pytest.mark.parametrize(
    ("headers", "outcome"),
    [
        ({"Host": "evil.example"}, (421, "HOST_NOT_ALLOWED")),
        ({"Host": "evil.example", "Origin": "http://evil.example"}, (421, "HOST_NOT_ALLOWED")),
        ({"Origin": "http://evil.example"}, (403, "ORIGIN_NOT_ALLOWED")),
        ({"Origin": "null"}, (403, "ORIGIN_NOT_ALLOWED")),
        ({"Origin": SITE + ".evil"}, (403, "ORIGIN_NOT_ALLOWED")),
    ],
)
@pytest.mark.parametrize(
    ("method", "path"),
    [
        *(SET, ("GET", "/v1/models"), ("GET", "/v1/mix/events"), ("DELETE", "/v1/adapters/b")),
        *(("GET", "/"), ("GET", "/mixer/main.js")),
    ],
)
def test_pages_of_other_sites_reach_nothing(
    http: Http, headers: dict[str, str], outcome: tuple[int, str], method: str, path: str
) -> None:
    answer = http.ask(method, path, {"mix": {}}, headers=headers)
    assert answer.outcome == outcome
    assert "access-control-allow-origin" not in answer.headers


@pytest.mark.parametrize(
    "media_type",
    [
        *("text/plain", "application/x-www-form-urlencoded", "multipart/form-data; boundary=x"),
        *("", "application/json5", "text/plain, application/json"),
    ],
)
@pytest.mark.parametrize("path", ["/v1/mix/add", "/v1/mix/analyze", "/v1/mix/verify"])
def test_what_a_form_of_a_page_can_send_is_no_request(
    http: Http, path: str, media_type: str
) -> None:
    answer = http.ask("POST", path, body=b"{}", headers={"Content-Type": media_type})
    assert answer.outcome == (415, "MEDIA_TYPE_NOT_SUPPORTED")


@pytest.mark.parametrize("name", ["Content-Encoding", "Transfer-Encoding"])
def test_a_body_in_a_coding_that_is_not_read_is_told_of(http: Http, name: str) -> None:
    """Whatever is in it: a server that passes the field over would read another body than meant."""
    coding = "gzip" if name == "Content-Encoding" else "gzip, chunked"
    body = b"0\r\n\r\n" if name == "Transfer-Encoding" else b'{"mix": {"b": 1}}'
    answer = http.ask("PUT", "/v1/mix", body=body, headers={**JSON, name: coding})
    assert answer.outcome == (415, "CODING_NOT_SUPPORTED")


def test_pages_of_other_sites_get_no_leave(http: Http) -> None:
    wanted = {"Access-Control-Request-Method": "PUT", "Origin": "http://evil.example"}
    answer = http.ask("OPTIONS", "/v1/mix", headers=wanted)
    assert answer.outcome == (403, "ORIGIN_NOT_ALLOWED")
    assert not [name for name in answer.headers if name.startswith("access-control")]


def test_pages_of_a_named_site_get_leave_and_read_answers_and_errors(http: Http) -> None:
    wanted = {
        "Origin": SITE,
        "Access-Control-Request-Method": "PUT",
        "Access-Control-Request-Headers": "content-type,if-match",
    }
    leave = http.ask("OPTIONS", "/v1/mix", headers=wanted)
    assert (leave.status, leave.body) == (204, b"")
    assert leave.headers["access-control-allow-origin"] == SITE
    assert "PUT" in leave.headers["access-control-allow-methods"]
    assert leave.headers["access-control-allow-headers"] == "content-type,if-match"
    for answer in (
        http.ask("GET", "/v1/mix", headers={"Origin": SITE}),
        http.ask("PUT", "/v1/mix", {"mix": 1}, headers={"Origin": SITE}),
        http.ask("GET", "/nowhere", headers={"Origin": SITE, "Host": "box.example"}),
    ):
        assert answer.headers["access-control-allow-origin"] == SITE
        assert "etag" in answer.headers["access-control-expose-headers"]
        assert answer.headers["vary"] == "origin"
    refused = http.ask("GET", "/v1/mix", headers={"Origin": SITE, "Host": "evil.example"})
    assert refused.outcome == (421, "HOST_NOT_ALLOWED")


# Bodies.

BODIES = {
    "nothing": b"",
    "no JSON": b"{",
    "no object": b"[]",
    "not UTF-8": b'{"mix": {"\xff": 1}}',
    "UTF-16": '{"mix": {}}'.encode("utf-16"),
    "a byte order mark": b"\xef\xbb\xbf{}",
    "half a character": b'{"mix": {"\\ud800": 1}}',
    "NaN": b'{"mix": {"a": NaN}}',
    "an infinity": b'{"mix": {"a": Infinity}}',
    "a number above all doubles": b'{"mix": {"a": 1e999}}',
    "an integer of 400 digits": b'{"mix": {"a": ' + b"9" * 400 + b"}}",
    "an integer of 10,000 digits": b'{"mix": {"a": ' + b"9" * 10_000 + b"}}",
    "the mix twice": b'{"mix": {}, "mix": {"b": 1}}',
    "a domain twice": b'{"mix": {"a": 1, "a": 2}}',
    "10,000 brackets": b'{"mix": ' + b"[" * 10_000 + b"]" * 10_000 + b"}",
    "10,000 objects": b'{"a":' * 10_000 + b"1" + b"}" * 10_000,
    "two values": b"{} {}",
    "NUL": b'{"mix": {}}\x00',
    "an unknown field": b'{"mix": {}, "residency": "auto"}',
    "a mix of another kind": b'{"mix": "a=1"}',
    "a weight of another kind": b'{"mix": {"a": true}}',
    "a name that is none": json.dumps({"mix": {"A" * 100_000: 1}}).encode(),
    "gzip": bytes.fromhex("1f8b08000000000000ffab5600000000ffff"),
}


@pytest.mark.parametrize("name", BODIES)
def test_bodies_that_mean_nothing_are_refused(http: Http, name: str) -> None:
    answer = http.ask(*SET, body=BODIES[name], headers=JSON)
    assert answer.status == 400
    assert answer.reason in {
        *("REQUEST_UNREADABLE", "UNKNOWN_FIELD", "MISSING_FIELD", "INVALID_MIX", "INVALID_FIELD")
    }
    assert len(answer.body) < 1000


def test_a_body_of_10_mib_is_refused_and_its_sender_hears_so(http: Http) -> None:
    body = b'{"mix": {}, "x": "' + b"y" * (10 << 20) + b'"}'
    declared = http.ask(*SET, body=body, headers=JSON)
    assert declared.outcome == (413, "BODY_TOO_LARGE")
    parts = (body[at : at + 65536] for at in range(0, len(body), 65536))
    assert http.ask(*SET, body=parts, headers=JSON).outcome == (413, "BODY_TOO_LARGE")


def test_a_body_that_never_ends_is_ended(http: Http) -> None:
    def endless() -> Iterator[bytes]:
        while True:
            yield b"x" * (1 << 20)

    with pytest.raises(ConnectionError):
        http.ask(*SET, body=endless(), headers=JSON)


def test_a_body_that_does_not_come_is_not_waited_for(
    http: Http, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(protocol, "PATIENCE_SECONDS", 0.05)
    with raw(http) as connection:
        connection.sendall(head(http, b"Content-Length: 100\r\n") + b'{"mix":')
        assert b"REQUEST_TOO_SLOW" in read_to_end(connection)


# What is no request.


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("PATCH", "/v1/mix", 405),
        ("POST", "/v1/mix", 405),
        ("DELETE", "/v1/mix", 405),
        ("OPTIONS", "/v1/mix", 405),
        ("TRACE", "/v1/mix", 405),
        ("POST", "/healthz", 405),
        ("HEAD", "/v1/mix/events", 405),
        ("POST", "/", 405),
        ("GET", "/mixer/..%2fpage.py", 404),
        ("GET", "/mixer/vendor/../../page.py", 404),
        ("GET", "/v1/mix/", 404),
        ("GET", "//v1/mix", 404),
        ("GET", "/v1/../v1/mix", 404),
        ("GET", "/v1/%6dix%00", 404),
        ("GET", "/V1/MIX", 404),
        ("GET", "/v1/adapters/..%2f..%2fetc", 404),
        ("DELETE", "/v1/adapters/%2e%2e", 404),
        ("GET", "/v1/adapters/" + "x" * 10_000, 404),
    ],
)
def test_there_is_nothing_else(http: Http, method: str, path: str, status: int) -> None:
    answer = http.ask(method, path)
    assert answer.status == status
    assert len(answer.body) < 1000
    if status == 405 and method != "HEAD":
        assert answer.reason == "METHOD_NOT_ALLOWED"
        assert answer.headers["allow"]


def raw(http: Http) -> closing[socket.socket]:
    host, _, port = http.address.rpartition(":")
    return closing(socket.create_connection((host, int(port)), PATIENCE))


def head(http: Http, more: bytes = b"", target: bytes = b"PUT /v1/mix") -> bytes:
    host = f"Host: {http.address}\r\nContent-Type: application/json\r\n".encode()
    return target + b" HTTP/1.1\r\n" + host + more + b"\r\n"


def read_to_end(connection: socket.socket) -> bytes:
    answer = b""
    while part := connection.recv(1 << 16):
        answer += part
    return answer


def test_10_000_header_fields_are_refused(http: Http) -> None:
    with raw(http) as connection:
        connection.sendall(head(http, b"X: y\r\n" * 10_000))
        assert b"HEAD_TOO_LARGE" in read_to_end(connection)


def test_probes_need_no_host_at_all(http: Http) -> None:
    for method, status in (("GET", 200), ("POST", 405)):
        assert http.ask(method, "/readyz", headers={"Host": "["}).status == status


def test_http_1_0_is_refused_but_for_probes(http: Http) -> None:
    for target, status in ((b"/v1/mix", b"505"), (b"/healthz", b"200")):
        with raw(http) as connection:
            connection.sendall(b"GET " + target + b" HTTP/1.0\r\n\r\n")
            assert read_to_end(connection).split()[1] == status


def test_garbage_behind_a_request_is_no_request(http: Http) -> None:
    with raw(http) as connection:
        mix = head(http, target=b"GET /v1/mix")
        connection.sendall(mix + mix + b"\x00\xff garbage\r\n\r\n" + mix)
        assert read_to_end(connection).count(b"HTTP/1.1 200") <= 2


@pytest.mark.parametrize(
    "sent",
    [
        b"",
        b"PUT",
        b"HEAD",  # of a body that does not come
        b"WATCH",
    ],
)
def test_a_half_closed_connection_is_ended(http: Http, server: Served, sent: bytes) -> None:
    with raw(http) as connection:
        whole = {
            b"HEAD": head(http, b"Content-Length: 100\r\n") + b"{",
            b"WATCH": head(http, target=b"GET /v1/mix/events"),
        }
        connection.sendall(whole.get(sent, sent))
        connection.shutdown(socket.SHUT_WR)
        read_to_end(connection)
    # That of the metrics stays.
    wait_until(lambda: len(server.runtime.default_mix._watchers) == 1, "the watch has ended")

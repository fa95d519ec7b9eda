"""The files of the page, as they are served and as they are packed."""

from __future__ import annotations

import asyncio
import hashlib
import re
from dataclasses import dataclass

import pytest
from starlette.applications import Starlette
from starlette.types import Message

from superpose_server.door.http.page import FOLDER, page_routes

APP = Starlette(routes=page_routes())


@dataclass(frozen=True)
class Answer:
    status: int
    headers: dict[str, str]
    body: bytes


def ask(path: str, *headers: tuple[str, str], method: str = "GET") -> Answer:
    sent: list[Message] = []

    async def receive() -> Message:
        return {"type": "http.request"}

    async def send(message: Message) -> None:
        sent.append(message)

    scope = {
        "type": "http",
        "method": method,
        "path": path,
        "query_string": b"",
        "headers": [(name.encode(), value.encode()) for name, value in headers],
    }
    asyncio.run(APP(scope, receive, send))
    found = {name.decode(): value.decode() for name, value in sent[0]["headers"]}
    return Answer(
        sent[0]["status"], found, b"".join(message.get("body", b"") for message in sent[1:])
    )


@pytest.mark.parametrize(
    ("path", "file", "media_type"),
    [
        ("/", "index.html", "text/html; charset=utf-8"),
        ("/mixer/main.js", "main.js", "text/javascript; charset=utf-8"),
        ("/mixer/mixer.css", "mixer.css", "text/css; charset=utf-8"),
        ("/mixer/icon.svg", "icon.svg", "image/svg+xml"),
        (
            "/mixer/vendor/htm-preact.js",
            "vendor/htm-preact.js",
            "text/javascript; charset=utf-8",
        ),
    ],
)
def test_files_are_served_as_what_they_are(path: str, file: str, media_type: str) -> None:
    answer = ask(path)
    assert (answer.status, answer.headers["content-type"]) == (200, media_type)
    assert answer.body == (FOLDER / file).read_bytes()
    assert answer.headers["x-content-type-options"] == "nosniff"
    assert answer.headers["cache-control"] == "no-cache"
    assert ask(path, method="HEAD").headers == answer.headers


def test_a_browser_that_has_a_file_is_not_sent_it_again() -> None:
    etag = ask("/").headers["etag"]
    for matching in (etag, f'"other", {etag}', f"W/{etag}"):
        again = ask("/", ("if-none-match", matching))
        assert (again.status, again.body, again.headers["etag"]) == (304, b"", etag)
    assert ask("/", ("if-none-match", '"other"')).status == 200
    assert ask("/mixer/main.js").headers["etag"] != etag


def test_a_browser_runs_and_asks_nothing_but_what_this_server_has() -> None:
    policy = dict(
        directive.split(" ", 1)
        for directive in ask("/").headers["content-security-policy"].split("; ")
    )
    assert policy.pop("require-trusted-types-for") == "'script'"
    own = ("script-src", "style-src", "connect-src", "img-src")
    assert {policy.pop(name) for name in own} == {"'self'"}
    assert set(policy.values()) == {"'none'"}
    assert set(policy) >= {"default-src", "base-uri", "form-action", "frame-ancestors"}
    # So the page has nothing inline, which would not run.
    page = (FOLDER / "index.html").read_text()
    assert re.findall(r"<script[^>]*>(.*?)</script>", page) == [""]
    assert not re.search(r"<style|\sstyle=|\son\w+=", page)


@pytest.mark.parametrize(
    "path",
    [
        "/index.html",
        "/mixer",
        "/mixer/",
        "/mixer/jsconfig.json",
        "/mixer/vendor/LICENSE-htm",
        "/mixer/../page.py",
        "/mixer/vendor/../main.js",
        "/mixer//main.js",
        "//mixer/main.js",
    ],
)
def test_nothing_else_is_there(path: str) -> None:
    assert ask(path).status == 404


def test_it_can_only_be_read() -> None:
    assert [ask("/", method=method).status for method in ("POST", "PUT", "DELETE")] == 3 * [405]


def test_code_of_others_is_what_it_is_said_to_be() -> None:
    vendor = FOLDER / "vendor"
    sums = re.findall(r"^ {4}([0-9a-f]{64})  (\S+)$", (vendor / "README.md").read_text(), re.M)
    said = {name: digest for digest, name in sums}
    held = {
        file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in vendor.glob("*.js")
    }
    assert said == held
    assert {"LICENSE-htm", "LICENSE-preact"} <= {file.name for file in vendor.iterdir()}

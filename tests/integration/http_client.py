"""A plain HTTP client for tests, which holds every answer against the server's own document."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from contextlib import closing
from dataclasses import dataclass
from functools import cached_property
from http.client import HTTPConnection
from typing import Any

from jsonschema import Draft202012Validator
from tests.integration.harness import PATIENCE

JSON = {"Content-Type": "application/json"}


@dataclass(frozen=True)
class Answer:
    """An answer: status, header fields by their names in lower case, and body."""

    status: int
    headers: Mapping[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def events(self) -> list[Any]:
        """What the events of a stream hold, but for the word that ends it."""
        data = [event.rpartition(b"data: ")[2] for event in self.body.split(b"\n\n")]
        return [json.loads(each) for each in data if each not in (b"", b"[DONE]")]

    @property
    def reason(self) -> str:
        """The reason of a refusal, which is in OpenAI's form."""
        error = self.json["error"]
        assert set(error) - {"metadata"} == {"message", "type", "param", "code"}
        assert "\n" not in error["message"]
        return str(error["code"])

    @property
    def outcome(self) -> tuple[int, str]:
        return self.status, self.reason


class Http:
    """Asks the HTTP door at an address, each time on a connection of its own.

    `usual` are header fields of every request.
    """

    def __init__(self, address: str, usual: Mapping[str, str] | None = None) -> None:
        self.address = address
        self._usual = dict(usual or {})

    def connect(self) -> HTTPConnection:
        return HTTPConnection(self.address, timeout=PATIENCE)

    def ask(
        self,
        method: str,
        path: str,
        value: Any = None,
        *,
        body: bytes | Iterable[bytes] | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> Answer:
        """Send `value` as JSON, or `body` as it is."""
        given = {**self._usual, **(headers or {})}
        if value is not None:
            body, given = json.dumps(value).encode(), {**JSON, **given}
        with closing(self.connect()) as connection:
            connection.request(method, path, body, given)
            answer = connection.getresponse()
            found = {name.lower(): text for name, text in answer.getheaders()}
            got = Answer(answer.status, found, answer.read())
        if method != "HEAD" and got.status == 200:
            self._check(method, path.partition("?")[0], got)
        return got

    @cached_property
    def document(self) -> Any:
        with closing(self.connect()) as connection:
            connection.request("GET", "/openapi.json", headers=self._usual)
            return json.loads(connection.getresponse().read())

    def _check(self, method: str, path: str, answer: Answer) -> None:
        for described, operations in self.document["paths"].items():
            if _matches(described, path) and method.lower() in operations:
                content = operations[method.lower()]["responses"]["200"]["content"]
                schema = content[answer.headers["content-type"].partition(";")[0]]["schema"]
                for value in answer.events if "contentSchema" in schema else [answer.json]:
                    self._validate(schema.get("contentSchema", schema), value)
                return
        raise AssertionError(f"{method} {path} is not in the document")

    def _validate(self, schema: Any, value: Any) -> None:
        whole = {"components": self.document["components"], **schema}
        Draft202012Validator(whole).validate(value)


def _matches(described: str, path: str) -> bool:
    parts, given = described.split("/"), path.split("/")
    return len(parts) == len(given) and all(
        part == each or part.startswith("{") for part, each in zip(parts, given, strict=True)
    )

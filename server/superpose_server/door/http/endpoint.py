"""One method of one path: what calls are routed by, and what the document is made from."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from superpose_server.door.http.fields import Asked, Form
from superpose_server.door.http.upload import Upload

# A page may send these without asking first, if it names no media type that a form has not.
_WITH_BODY = {"POST", "PUT"}
NO_QUERY = Form("query", ())


@dataclass(frozen=True)
class Endpoint:
    """How a call is answered.

    Attributes:
        method: GET, POST and so on.
        path: As Starlette writes it, with parameters in braces.
        answer: From the call and what it asks, as `form` and `query` read it.
        about: What it does, for people, in one line.
        form: What its body holds, JSON or files; None: it has none.
        query: What its query may hold.
        reply: What it answers, as JSON Schema; None: it only streams.
        events: What each event of a stream holds, as JSON Schema; None: it does not stream.
        if_match: Whether `If-Match` may name a generation; elsewhere it is refused.

    Raises:
        ValueError: A method that changes or computes, without a body whose media type is asked for;
            or answers that nothing describes.
    """

    method: str
    path: str
    answer: Callable[[Request, Asked], Awaitable[Response]]
    about: str
    form: Form | Upload | None = None
    query: Form = NO_QUERY
    reply: Mapping[str, Any] | None = None
    events: Mapping[str, Any] | None = None
    if_match: bool = False

    def __post_init__(self) -> None:
        """Check that no page can call this as a mere form of its own."""
        if self.method in _WITH_BODY and self.form is None:
            raise ValueError(f"{self.method} {self.path} has no body, so any page could send it")
        if self.reply is None and self.events is None:
            raise ValueError(f"{self.method} {self.path} says of no answer what it holds")

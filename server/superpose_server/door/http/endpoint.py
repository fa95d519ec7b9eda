"""One method of one path: what calls are routed by, and what the document is made from."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from starlette.requests import Request
from starlette.responses import Response

from superpose_server.door.http.fields import Asked, Form


@dataclass(frozen=True)
class Endpoint:
    """How a call is answered.

    Attributes:
        method: GET, POST and so on.
        path: As Starlette writes it, with parameters in braces.
        answer: From the call and its body, as `form` read it (empty without one).
        about: What it does, for people, in one line.
        form: What its JSON body may hold; None: it has none.
    """

    method: str
    path: str
    answer: Callable[[Request, Asked], Awaitable[Response]]
    about: str
    form: Form | None = None

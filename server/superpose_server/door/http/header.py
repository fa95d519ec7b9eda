"""Header fields that decide something: each is there once, or the request is refused.

Of several a proxy may have checked another one than we would read.
"""

from __future__ import annotations

from starlette.types import Scope

from superpose_server.door.http.status import HttpError


def header(scope: Scope, name: str) -> str | None:
    """Return the value of the header field `name`, which is in lower case, or None.

    Raises:
        HttpError: It is there several times.
    """
    key = name.encode()
    values = [value for other, value in scope["headers"] if other == key]
    if len(values) > 1:
        raise HttpError(400, f"{name} is sent {len(values)} times: send it once", "HEADER_REPEATED")
    return values[0].decode("latin-1") if values else None

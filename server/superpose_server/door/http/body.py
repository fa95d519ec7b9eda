"""A body: of the media type that its endpoint wants, no larger than it may be, and read as a form.

The media type is a guard too: a page of another site can send a browser's forms anywhere, but what
is JSON only after the browser has asked, and been refused. See `site`.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator

from starlette.requests import Request

from superpose_adapters.strict_json import StrictJsonError, read_object
from superpose_server.door.http.fields import Asked, Form
from superpose_server.door.http.header import header
from superpose_server.door.http.status import HttpError
from superpose_server.errors import InvalidArgument

# Of JSON: more than the longest text that is taken, and little enough to be read in an instant.
MOST_JSON_BYTES = 8 << 20
# Fields that say how a body is wrapped, and how it may be.
_CODINGS = {"content-encoding": "identity", "transfer-encoding": "chunked"}
# From this many bytes on, a body is read beside the event loop.
_LONG_BODY = 1 << 16


async def read_body(request: Request, form: Form) -> Asked:
    """Return what the JSON body of a call holds.

    Raises:
        HttpError: It is of another media type, or too large.
        InvalidArgument: It is no JSON object, or not what `form` says.
    """
    check_media_type(request, "application/json")
    body = b"".join([part async for part in arriving(request, MOST_JSON_BYTES)])
    if len(body) < _LONG_BODY:
        return _parse(body, form)
    return await asyncio.to_thread(_parse, body, form)


def check_media_type(request: Request, wanted: str) -> None:
    """Refuse a body that is said to be something else, or nothing, or to be compressed.

    Raises:
        HttpError: Its media type is not `wanted`, or it is in a coding that is not read.
    """
    for name, plain in _CODINGS.items():
        coding = header(request.scope, name) or plain
        if coding.lower() != plain:
            raise HttpError(
                415,
                f"{name} is {coding[:80]!r}: send the body as it is",
                "CODING_NOT_SUPPORTED",
            )
    given = header(request.scope, "content-type") or ""
    if given.partition(";")[0].strip().lower() != wanted:
        raise HttpError(
            415,
            f"the body's content-type is {given[:80]!r}: send {wanted}",
            "MEDIA_TYPE_NOT_SUPPORTED",
        )


async def arriving(request: Request, most: int) -> AsyncGenerator[bytes]:
    """Return the body in parts, as they arrive.

    Raises:
        HttpError: It has more than `most` bytes, or says that it has.
    """
    size = int(request.headers.get("content-length", 0))
    _check_size(size, most)
    size = 0
    async for part in request.stream():
        size += len(part)
        _check_size(size, most)
        yield part


def _check_size(size: int, most: int) -> None:
    if size > most:
        raise HttpError(413, f"the body is too large: send at most {most} bytes", "BODY_TOO_LARGE")


def _parse(body: bytes, form: Form) -> Asked:
    try:
        value = read_object(body)
    except StrictJsonError as error:
        raise InvalidArgument(
            f"the body {error}: send one JSON object", "REQUEST_UNREADABLE"
        ) from error
    return form.read(value)

"""A JSON body, read as a form says."""

from __future__ import annotations

import asyncio

from starlette.requests import Request

from superpose_adapters.strict_json import StrictJsonError, read_object
from superpose_server.door.http.fields import Asked, Form
from superpose_server.errors import InvalidArgument

# From this many bytes on, a body is read beside the event loop.
_LONG_BODY = 1 << 16


async def read_body(request: Request, form: Form) -> Asked:
    """Return what the body of a call holds.

    Raises:
        InvalidArgument: It is no JSON object, or not what `form` says.
    """
    body = await request.body()
    if len(body) < _LONG_BODY:
        return _parse(body, form)
    return await asyncio.to_thread(_parse, body, form)


def _parse(body: bytes, form: Form) -> Asked:
    try:
        value = read_object(body)
    except StrictJsonError as error:
        raise InvalidArgument(
            f"the body {error}: send one JSON object", "REQUEST_UNREADABLE"
        ) from error
    return form.read(value)

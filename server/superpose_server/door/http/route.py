"""A path and all that answers there: asked whether it may be called, then read, then answered."""

from __future__ import annotations

from collections.abc import Sequence

from starlette.requests import Request
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from superpose_server.door.access.access import Access
from superpose_server.door.access.scopes import need_of_endpoint
from superpose_server.door.http.body import read_body
from superpose_server.door.http.endpoint import Endpoint
from superpose_server.door.http.fields import Asked, Form
from superpose_server.door.http.header import header
from superpose_server.door.http.peer import peer_of
from superpose_server.door.http.upload import Upload, read_upload
from superpose_server.errors import InvalidArgument


def make_route(path: str, served: Sequence[Endpoint], access: Access) -> Route:
    """Return the route of a path, whose methods are those of its endpoints.

    Raises:
        ValueError: Nothing is said of who may call one of them.
    """
    route = Route(path, _Answers(served, access), methods=[each.method for each in served])
    if any(each.method == "GET" and each.reply is None for each in served):
        assert route.methods is not None
        route.methods.discard("HEAD")  # Of a stream, which has no end to answer at.
    return route


class _Answers:
    """What answers at one path: an ASGI application, so that a call lasts as long as its answer."""

    def __init__(self, served: Sequence[Endpoint], access: Access) -> None:
        self._endpoints = {each.method: each for each in served}
        self._needs = {each.method: need_of_endpoint(each.method, each.path) for each in served}
        self._access = access

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        method = "GET" if scope["method"] == "HEAD" else scope["method"]
        # Here and nowhere else: nothing of the request but its head has been read.
        token = self._access.check(header(scope, "authorization"), self._needs[method])
        end = self._access.begin(token, peer_of(scope))
        try:
            endpoint = self._endpoints[method]
            request = Request(scope, receive, send)
            response = await endpoint.answer(request, await _read(request, endpoint))
            await response(scope, receive, send)
        finally:
            end()


async def _read(request: Request, endpoint: Endpoint) -> Asked:
    """Return what a call asks for, in its query and its body.

    Raises:
        InvalidArgument: It asks for something that the endpoint does not know.
    """
    if "if-match" in request.headers and not endpoint.if_match:
        raise InvalidArgument(
            f"if-match means nothing to {endpoint.method} {endpoint.path}: leave it out",
            "IF_MATCH_NOT_SUPPORTED",
            field="if-match",
        )
    given = request.query_params.multi_items()
    query = endpoint.query.read(dict(given))
    if len(request.query_params) < len(given):
        raise InvalidArgument("the query names something twice: name it once", "FIELD_TWICE")
    match endpoint.form:
        case None:
            return query
        case Form():
            return {**query, **await read_body(request, endpoint.form)}
        case Upload():
            return {**query, **await read_upload(request, endpoint.form)}

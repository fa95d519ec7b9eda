"""All endpoints and the page as one application; guards come before them, in one place."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from superpose_server.config import ServerConfig, split_address
from superpose_server.door.access.access import Access
from superpose_server.door.http.adapters import Adapters
from superpose_server.door.http.audit import Changes
from superpose_server.door.http.calls import Calls
from superpose_server.door.http.chat import ChatCompletions
from superpose_server.door.http.completions import Completions
from superpose_server.door.http.endpoint import Endpoint
from superpose_server.door.http.fit import Fits
from superpose_server.door.http.mixes import Mixes
from superpose_server.door.http.models import Models
from superpose_server.door.http.openapi import Document
from superpose_server.door.http.page import page_routes
from superpose_server.door.http.route import make_route
from superpose_server.door.http.score import ScoreTexts
from superpose_server.door.http.server_info import ServerInfo
from superpose_server.door.http.site import SiteGuard
from superpose_server.door.http.status import HttpError
from superpose_server.engine.token_bytes import TokenBytes
from superpose_server.errors import NotFound
from superpose_server.inference.inference import Inference
from superpose_server.runtime import Runtime


def endpoints(runtime: Runtime, inference: Inference) -> tuple[Endpoint, ...]:
    """Return everything that is served."""
    token_bytes = TokenBytes(runtime.tokenizer)
    served = (
        *Models(runtime, inference).endpoints(),
        *Completions(runtime, inference, token_bytes).endpoints(),
        *ChatCompletions(inference, token_bytes).endpoints(),
        *ScoreTexts(inference).endpoints(),
        *Mixes(runtime, inference).endpoints(),
        *Fits(inference).endpoints(),
        *Adapters(runtime, inference).endpoints(),
        *Changes(runtime).endpoints(),
        *ServerInfo(runtime).endpoints(),
    )
    return Document(served).endpoints


def make_app(runtime: Runtime, inference: Inference, access: Access) -> Starlette:
    """Return what answers every call of those whom `access` lets in."""
    app = Starlette(
        routes=[*page_routes(), *_routes(endpoints(runtime, inference), access)],
        middleware=[
            Middleware(Calls, failed=runtime.metrics.request_failed),
            Middleware(SiteGuard, hosts=_hosts(runtime.config), origins=runtime.config.cors_origin),
        ],
        exception_handlers={HTTPException: _refuse},
    )
    # A client that follows a redirect may send a body a second time, or not at all.
    app.router.redirect_slashes = False
    return app


def _hosts(config: ServerConfig) -> tuple[str, ...]:
    """Return the names that the server goes by, beside localhost."""
    listening, _ = split_address("http-listen", config.http_listen)
    return (listening.lower(), *config.http_host)


def _routes(served: Sequence[Endpoint], access: Access) -> list[Route]:
    """Return a route a path."""

    def path(endpoint: Endpoint) -> str:
        return endpoint.path

    paths = groupby(sorted(served, key=path), path)
    return [make_route(each, list(group), access) for each, group in paths]


async def _refuse(request: Request, error: Exception) -> Response:
    """Refuse what there is no endpoint for.

    Raises:
        ServerError: Always; see `Calls`.
    """
    assert isinstance(error, HTTPException)
    path = request.scope["path"][:200]  # Its URL is made of a Host that may be none.
    if error.status_code == 404:
        raise NotFound(
            f"there is nothing at {path}: /openapi.json lists what is served", "PATH_NOT_FOUND"
        )
    if error.status_code == 405:
        allowed = (error.headers or {}).get("Allow", "")
        raise HttpError(
            405,
            f"{request.method} is not served at {path}: use {allowed}",
            "METHOD_NOT_ALLOWED",
            headers={"allow": allowed},
        )
    raise error

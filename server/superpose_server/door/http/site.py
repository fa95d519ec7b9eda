"""Which sites may reach the door: a page in a browser must not, unless its site is named.

A page on another site can send requests to any address that its reader can reach, this one too.
Two header fields that no page can forge tell them apart. `Host` is the name that the browser asked:
by DNS rebinding a page's own name can lead here, so only names of this server are answered.
`Origin` is the page's site: tools send none, pages of this server their own, others are refused.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Collection

from starlette.responses import Response
from starlette.types import ASGIApp, Receive, Scope, Send

from superpose_server.door.http.header import header
from superpose_server.door.http.status import HttpError

# Told to anybody, because probes come by address; they tell no more than that a server is here.
PROBES = frozenset({"/healthz", "/readyz"})
# The header fields of answers that a page of a named site may read.
_EXPOSED = b"etag, retry-after, x-request-id, x-superpose-generation, x-superpose-mix-digest"
_PREFLIGHT_SECONDS = 600  # that a browser may remember its leave
_AUTHORITY = re.compile(r"(?:\[([0-9a-f:.]+)\]|([^\s:/@\[\]]+))(?::[0-9]{0,5})?")


class SiteGuard:
    """Lets through what no page of another site has sent; an ASGI application around another.

    Pages of sites that are named are told so by CORS: `request.state.headers` goes with every
    answer, and what their browsers ask beforehand is answered here.
    """

    def __init__(self, app: ASGIApp, hosts: Collection[str], origins: Collection[str]) -> None:
        """Guard `app`.

        Args:
            app: Gets what is let through.
            hosts: Names, without ports, that this server goes by beside localhost. Loopback
                addresses are its own, and so is the address that a request has come to.
            origins: Sites whose pages may ask too, such as `https://chat.example`.
        """
        self._app = app
        self._hosts = frozenset({"localhost", *hosts})
        self._origins = frozenset(origins)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """See ASGI.

        Raises:
            HttpError: The request is refused.
        """
        if scope["path"] in PROBES:
            await self._app(scope, receive, send)
            return
        origin = self._check(scope)
        if origin is not None and scope["method"] == "OPTIONS":
            await _preflight(scope)(scope, receive, send)
            return
        await self._app(scope, receive, send)

    def _check(self, scope: Scope) -> str | None:
        """Return the named site whose page has sent this, if one has."""
        if scope["http_version"] == "1.0":
            raise HttpError(
                505,
                "HTTP/1.0 names no host and has no streams: use HTTP/1.1 (in nginx, "
                "proxy_http_version 1.1)",
                "HTTP_VERSION_NOT_SUPPORTED",
            )
        host = (header(scope, "host") or "").lower()
        if not self._is_own(host, scope):
            raise HttpError(
                421,
                f"host {host[:80]!r} is no name of this server: ask for localhost or the address "
                "that it listens on, or start it with --http-host NAME",
                "HOST_NOT_ALLOWED",
            )
        origin = header(scope, "origin")
        if self._origins:
            scope["state"]["headers"].append((b"vary", b"origin"))
        if origin is None:
            return None
        origin = origin.lower()
        if origin in self._origins:
            scope["state"]["headers"] += [
                (b"access-control-allow-origin", origin.encode()),
                (b"access-control-expose-headers", _EXPOSED),
            ]
            return origin
        if origin not in (f"http://{host}", f"https://{host}"):
            raise HttpError(
                403,
                f"pages of origin {origin[:80]!r} may not use this server: start it with "
                "--cors-origin ORIGIN to let them",
                "ORIGIN_NOT_ALLOWED",
            )
        return None

    def _is_own(self, host: str, scope: Scope) -> bool:
        match = _AUTHORITY.fullmatch(host)
        if match is None:
            return False
        name = match[1] or match[2].removesuffix(".")
        if name in self._hosts:
            return True
        try:
            address = ipaddress.ip_address(name)
        except ValueError:
            return False
        connected_to = scope["server"]
        return address.is_loopback or (connected_to is not None and name == connected_to[0])


def _preflight(scope: Scope) -> Response:
    """Return the leave for a page of a named site to send what its browser asks about."""
    wanted = dict(scope["headers"]).get(b"access-control-request-headers", b"")
    return Response(
        status_code=204,
        headers={
            "access-control-allow-methods": "GET, POST, PUT, DELETE",
            # Whatever it is: a site that may do everything may send everything.
            "access-control-allow-headers": wanted.decode("latin-1"),
            "access-control-max-age": str(_PREFLIGHT_SECONDS),
        },
    )

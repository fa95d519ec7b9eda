"""Where a call came from."""

from __future__ import annotations

from starlette.types import Scope


def peer_of(scope: Scope) -> str:
    """Return where a call came from, as gRPC writes it; "" if nobody knows."""
    if scope.get("client") is None:  # ASGI lets a server leave it out.
        return ""
    host, port = scope["client"]
    return f"ipv6:[{host}]:{port}" if ":" in host else f"ipv4:{host}:{port}"

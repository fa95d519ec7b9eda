"""The mixer: a page for people at `/`, made of the files in `mixer/`.

All of them are read when the door is made, and each has a route of its own: nothing that a request
says is ever a path on the disk. There is no build step: what lies there is what a browser runs.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

FOLDER = Path(__file__).parent / "mixer"
_INDEX = "index.html"
# What else lies there, licences for one, is not served.
_MEDIA_TYPES = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
}
# The page loads and asks nothing but its own server, and never makes markup of a text: the browser
# holds it to both.
_POLICY = "; ".join(
    (
        "default-src 'none'",
        "script-src 'self'",
        "style-src 'self'",
        "connect-src 'self'",
        "img-src 'self'",
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
        "require-trusted-types-for 'script'",
        "trusted-types 'none'",
    )
)
_HEADERS = {
    # Asked for anew each time, and answered with 304: a page never mixes files of two versions.
    "cache-control": "no-cache",
    "content-security-policy": _POLICY,
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "referrer-policy": "no-referrer",
    "x-content-type-options": "nosniff",
}


@dataclass(frozen=True)
class PageFile:
    """A file of the page, and the answer that it is.

    Attributes:
        path: Where it is served: `/` for the page itself, `/mixer/...` for what it loads.
        body: Its bytes.
        media_type: Its content type.
        etag: Changes with its bytes.
    """

    path: str
    body: bytes
    media_type: str
    etag: str

    @classmethod
    def read(cls, file: Path) -> PageFile:
        """Return a file of `FOLDER`."""
        name = file.relative_to(FOLDER).as_posix()
        body = file.read_bytes()
        return cls(
            "/" if name == _INDEX else f"/mixer/{name}",
            body,
            _MEDIA_TYPES[file.suffix],
            f'"{hashlib.sha256(body).hexdigest()[:32]}"',
        )

    async def answer(self, request: Request) -> Response:
        """Return its bytes, or 304 to a browser that has them."""
        headers = {**_HEADERS, "etag": self.etag}
        if self.etag in request.headers.get("if-none-match", ""):
            return Response(status_code=304, headers=headers)
        return Response(self.body, headers=headers, media_type=self.media_type)


def page_routes() -> list[Route]:
    """Return a route for each file of the page."""
    files = sorted(file for file in FOLDER.rglob("*") if file.suffix in _MEDIA_TYPES)
    served = map(PageFile.read, files)
    return [Route(file.path, file.answer, methods=["GET"]) for file in served]

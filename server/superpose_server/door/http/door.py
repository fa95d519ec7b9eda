"""The HTTP door: Uvicorn on a socket of ours, on the event loop that gRPC uses."""

from __future__ import annotations

import asyncio
import contextlib
import socket

import uvicorn

from superpose_server.config import join_address, split_address
from superpose_server.door.access.access import Access
from superpose_server.door.door import CLOSING_SECONDS
from superpose_server.door.http.app import make_app
from superpose_server.door.http.protocol import BoundedProtocol
from superpose_server.door.tls import Tls
from superpose_server.errors import StartupError
from superpose_server.inference.inference import Inference
from superpose_server.runtime import Runtime

# A client whose machine is gone says nothing; its rows should not run on. As gRPC's: asked after 60
# seconds, given up 20 seconds later. A system that lacks an option goes by its own.
_KEEPALIVE = (("TCP_KEEPIDLE", 60), ("TCP_KEEPINTVL", 20), ("TCP_KEEPCNT", 1))


class HttpDoor:
    """Serves OpenAI's API, and ours; see `Door`."""

    def __init__(
        self, runtime: Runtime, inference: Inference, access: Access, tls: Tls | None
    ) -> None:
        """Serve from these whom `access` lets in, over `tls` if there is one."""
        self.address = ""
        self._tls = tls
        self._listen = runtime.config.http_listen
        self._server = uvicorn.Server(
            uvicorn.Config(
                make_app(runtime, inference, access),
                http=BoundedProtocol,
                ws="none",
                lifespan="off",
                log_config=None,
                log_level="warning",
                access_log=False,
                server_header=False,
                proxy_headers=False,
                timeout_graceful_shutdown=CLOSING_SECONDS,
            )
        )
        self._sockets: list[socket.socket] = []
        self._running: asyncio.Task[None] | None = None

    async def open(self) -> None:
        """See `Door`."""
        host, port = split_address("http-listen", self._listen)
        listening = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
        # Two servers on one address would each get a part of the calls, as SO_REUSEADDR lets them
        # on Windows.
        only = getattr(socket, "SO_EXCLUSIVEADDRUSE", socket.SO_REUSEADDR)
        listening.setsockopt(socket.SOL_SOCKET, only, 1)
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for name, value in _KEEPALIVE:  # What connects inherits it.
            if hasattr(socket, name):
                listening.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
        try:
            listening.bind((host, port))
        except OSError as error:
            listening.close()
            raise StartupError(
                f"cannot listen on {self._listen} for HTTP ({error.strerror}): choose a free port "
                "with --http-listen, or 0 for any"
            ) from error
        self._sockets = [listening]
        self.address = join_address(host, listening.getsockname()[1])
        server = self._server
        server.config.load()
        if self._tls is not None:
            # Of ours, as uvicorn's own reads its files once.
            server.config.ssl = self._tls.context
        server.lifespan = server.config.lifespan_class(server.config)
        # The parts of `serve` but the signals, which are the command's.
        await server.startup(self._sockets)
        self._running = asyncio.create_task(server.main_loop())

    async def tell_intact(self, intact: bool) -> None:
        """See `Door`."""

    async def tell_ending(self) -> None:
        """See `Door`."""

    async def close(self) -> None:
        """See `Door`."""
        if self._running is not None:
            self._running.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._running
            await self._server.shutdown(self._sockets)

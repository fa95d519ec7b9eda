"""The server: doors and metrics of a runtime, from ready to the end of the grace period."""

from __future__ import annotations

import asyncio
import socket

from prometheus_client import start_http_server
from prometheus_client.exposition import ThreadingWSGIServer

from superpose_server.config import split_address
from superpose_server.door.access.access import Access
from superpose_server.door.door import Door
from superpose_server.door.grpc.door import GrpcDoor
from superpose_server.door.tls import Tls
from superpose_server.errors import StartupError
from superpose_server.inference.inference import Inference
from superpose_server.runtime import Runtime

# On Windows SO_REUSEADDR lets two servers share an address; gRPC does not set it there either.
if hasattr(socket, "SO_EXCLUSIVEADDRUSE"):
    ThreadingWSGIServer.allow_reuse_address = False


class Server:
    """Opens every door of a runtime, and closes them in order.

    Attributes:
        address: HOST:PORT of the gRPC door, known after `start`.
        http_address: The same of the HTTP door; "" if there is none.
        admin_address: The same of the one for operators; "" if there is none of its own.
        metrics_address: The same of the metrics.
        failed: Set when nothing but a new start helps; `runtime.integrity.hopeless` says why.
    """

    def __init__(self, runtime: Runtime) -> None:
        """Serve `runtime`, which `stop` closes, on the running event loop.

        Raises:
            StartupError: The file of tokens or the certificate cannot be used.
        """
        self.runtime = runtime
        self.address = ""
        self.http_address = ""
        self.admin_address = ""
        self.metrics_address = ""
        self.failed = asyncio.Event()
        inference = Inference(runtime)
        access = Access(runtime.config.tokens)
        tls = Tls.of(runtime.config)
        self._admin: Door | None = None
        if runtime.config.admin_apart:
            self._admin = GrpcDoor(runtime, inference, access, tls, "admin-listen")
            access = access.without_admin()
        self._grpc = GrpcDoor(runtime, inference, access, tls)
        self._http: Door | None = None
        if runtime.config.serves_http:
            # Imported here: it needs packages that a server without it does not.
            from superpose_server.door.http.door import HttpDoor

            self._http = HttpDoor(runtime, inference, access, tls)
        doors = (self._grpc, self._http, self._admin)
        self._doors: list[Door] = [door for door in doors if door is not None]
        self._tasks: set[asyncio.Future[None]] = set()

    async def start(self) -> None:
        """Open the sockets and report that all is served.

        Raises:
            StartupError: An address cannot be listened on.
        """
        self._start_metrics()
        loop = asyncio.get_running_loop()

        def found(intact: bool) -> None:
            if not loop.is_closed():  # As it is after the server's end.
                loop.call_soon_threadsafe(self._tell_intact, intact)

        self.runtime.integrity.follow(found)
        for number, door in enumerate(self._doors):
            try:
                await door.open()
            except BaseException:
                for opened in self._doors[:number]:
                    await opened.close()
                raise
        self.address = self.runtime.grpc_address = self._grpc.address
        if self._http is not None:
            self.http_address = self._http.address
        if self._admin is not None:
            self.admin_address = self._admin.address
        if not self.runtime.integrity.intact:  # Found by a call while the doors were opened.
            self._tell_intact(False)

    def _start_metrics(self) -> None:
        config = self.runtime.config
        host, port = split_address("metrics-listen", config.metrics_listen)
        try:
            metrics, _ = start_http_server(port, host, self.runtime.scraped)
        except OSError as error:
            raise StartupError(
                f"cannot listen on {config.metrics_listen} for metrics ({error.strerror}): choose "
                "a free port with --metrics-listen, or 0 for any"
            ) from error
        self._metrics = metrics
        self.metrics_address = f"{host}:{metrics.server_port}"

    def _tell_intact(self, intact: bool) -> None:
        if self.runtime.integrity.hopeless:
            self.failed.set()
        for door in self._doors:
            task = asyncio.ensure_future(door.tell_intact(intact))
            self._tasks.add(task)  # The loop alone would not keep it alive.
            task.add_done_callback(self._tasks.discard)

    async def stop(self, grace: float) -> None:
        """Refuse new requests, let running ones end within `grace` seconds, then close all."""
        for door in self._doors:
            await door.tell_ending()
        await self.runtime.finish(grace)
        for door in self._doors:
            await door.close()
        await asyncio.to_thread(self._metrics.shutdown)  # its thread looks up twice a second
        self._metrics.server_close()
        await asyncio.to_thread(self.runtime.close)

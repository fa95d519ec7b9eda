"""The gRPC server: a socket in front of a runtime, from ready to the end of the grace period."""

from __future__ import annotations

import asyncio
import logging
import socket
from types import TracebackType

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection
from prometheus_client import start_http_server

from superpose_proto.v1 import (
    adapter_pb2,
    adapter_pb2_grpc,
    inference_pb2,
    inference_pb2_grpc,
    mix_pb2,
    mix_pb2_grpc,
    server_pb2,
    server_pb2_grpc,
)
from superpose_server.config import ServerConfig, split_address
from superpose_server.door.adapter_service import AdapterService
from superpose_server.door.inference_service import InferenceService
from superpose_server.door.mix_service import MixService
from superpose_server.door.server_service import ServerService
from superpose_server.door.status import ErrorInterceptor
from superpose_server.runtime import Runtime, StartupError

_SERVICES = tuple(
    file.DESCRIPTOR.services_by_name[name].full_name
    for file, name in (
        (inference_pb2, "InferenceService"),
        (mix_pb2, "MixService"),
        (adapter_pb2, "AdapterService"),
        (server_pb2, "ServerService"),
    )
)
# A push may be this much over the cap and still be told so in words, rather than by the transport.
_MESSAGE_MARGIN = 16 << 20
# What handlers get to send their last message after the engine has aborted their rows.
_CLOSING_SECONDS = 2.0

_log = logging.getLogger(__name__)


def check_addresses(config: ServerConfig) -> None:
    """Refuse an address that is taken, before a base is loaded for minutes in vain.

    Raises:
        StartupError: Names the flag and the address.
    """
    for flag, address in (("listen", config.listen), ("metrics-listen", config.metrics_listen)):
        host, port = split_address(flag, address)
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        with socket.socket(family) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((host, port))
            except OSError as error:
                raise StartupError(
                    f"cannot listen on --{flag} {address} ({error.strerror}): choose a free port, "
                    "or 0 for any"
                ) from error


class Server:
    """Serves a runtime on a socket.

    Attributes:
        address: HOST:PORT that it listens on, known after `start`.
        metrics_address: The same of the metrics.
    """

    def __init__(self, runtime: Runtime) -> None:
        """Serve `runtime`, which `stop` closes."""
        self.runtime = runtime
        self.address = ""
        self.metrics_address = ""
        self._health = health.aio.HealthServicer()  # type: ignore[attr-defined]  # types lack it
        self._grpc: grpc.aio.Server | None = None
        self._tasks: set[asyncio.Future[None]] = set()

    async def start(self) -> None:
        """Open the sockets and report SERVING.

        Raises:
            StartupError: An address cannot be listened on.
        """
        runtime = self.runtime
        config = runtime.config
        limit = runtime.limits.adapter.max_bytes + _MESSAGE_MARGIN
        server = grpc.aio.server(
            interceptors=[ErrorInterceptor(runtime.metrics.request_failed)],
            options=[
                ("grpc.max_receive_message_length", limit),
                # Two servers on one port would each get a part of the requests.
                ("grpc.so_reuseport", 0),
                # A client whose machine is gone says nothing; its rows should not run on.
                ("grpc.keepalive_time_ms", 60_000),
                ("grpc.keepalive_timeout_ms", 20_000),
            ],
        )
        inference_pb2_grpc.add_InferenceServiceServicer_to_server(InferenceService(runtime), server)
        mix_pb2_grpc.add_MixServiceServicer_to_server(MixService(runtime), server)
        adapter_pb2_grpc.add_AdapterServiceServicer_to_server(AdapterService(runtime), server)
        server_pb2_grpc.add_ServerServiceServicer_to_server(ServerService(runtime), server)
        health_pb2_grpc.add_HealthServicer_to_server(self._health, server)
        if config.reflection:
            names = (*_SERVICES, health.SERVICE_NAME, reflection.SERVICE_NAME)
            reflection.enable_server_reflection(names, server)
        host, _ = split_address("listen", config.listen)
        try:
            port = server.add_insecure_port(config.listen)
        except RuntimeError as error:
            raise StartupError(
                f"cannot listen on {config.listen}: choose a free port, or 0 for any"
            ) from error
        self._start_metrics()
        await server.start()
        self._grpc = server
        self.address = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
        await self._set_health(health_pb2.HealthCheckResponse.SERVING)
        runtime.follow_weights(self._weights_known)

    def _start_metrics(self) -> None:
        config = self.runtime.config
        host, port = split_address("metrics-listen", config.metrics_listen)
        try:
            http, _ = start_http_server(port, host, self.runtime.metrics.registry)
        except OSError as error:
            raise StartupError(
                f"cannot listen on {config.metrics_listen} for metrics ({error.strerror}): choose "
                "a free port with --metrics-listen, or 0 for any"
            ) from error
        self._http = http
        self.metrics_address = f"{host}:{http.server_port}"

    async def _set_health(self, status: int) -> None:
        for service in ("", *_SERVICES):
            await self._health.set(service, status)

    def _weights_known(self, intact: bool) -> None:
        """Send inference elsewhere while the weights are damaged; the other services go on."""
        status = health_pb2.HealthCheckResponse
        task = asyncio.ensure_future(
            self._health.set(_SERVICES[0], status.SERVING if intact else status.NOT_SERVING)
        )
        self._tasks.add(task)  # The loop alone would not keep it alive.
        task.add_done_callback(self._tasks.discard)

    async def stop(self, grace: float) -> None:
        """Refuse new requests, let running ones end within `grace` seconds, then close all."""
        await self._set_health(health_pb2.HealthCheckResponse.NOT_SERVING)
        await self.runtime.finish(grace)
        if self._grpc is not None:
            await self._grpc.stop(_CLOSING_SECONDS)
        await asyncio.to_thread(self._http.shutdown)  # its thread looks up twice a second
        self._http.server_close()
        await asyncio.to_thread(self.runtime.close)

    async def __aenter__(self) -> Server:
        """Start."""
        await self.start()
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Stop at once."""
        await self.stop(0.0)

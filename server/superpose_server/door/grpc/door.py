"""The gRPC door: the four services, health and reflection on one socket."""

from __future__ import annotations

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

from superpose_proto.v1 import (
    adapter_pb2,
    adapter_pb2_grpc,
    audit_pb2,
    audit_pb2_grpc,
    inference_pb2,
    inference_pb2_grpc,
    mix_pb2,
    mix_pb2_grpc,
    server_pb2,
    server_pb2_grpc,
)
from superpose_server.config import PUSH_MARGIN_MIB, join_address, split_address
from superpose_server.door.access.access import Access
from superpose_server.door.access.scopes import needs_of_methods
from superpose_server.door.contract.adapter_service import AdapterService
from superpose_server.door.contract.audit_service import AuditService
from superpose_server.door.contract.mix_service import MixService
from superpose_server.door.contract.server_service import ServerService
from superpose_server.door.door import CLOSING_SECONDS
from superpose_server.door.grpc.access import AccessInterceptor
from superpose_server.door.grpc.credentials import server_credentials
from superpose_server.door.grpc.departures import calm_departures
from superpose_server.door.grpc.inference_service import InferenceService
from superpose_server.door.grpc.reflection import describe_reflection, serve_reflection
from superpose_server.door.grpc.status import ErrorInterceptor
from superpose_server.door.tls import Tls
from superpose_server.errors import StartupError
from superpose_server.inference.inference import Inference
from superpose_server.model.memory import MIB
from superpose_server.runtime import Runtime

# InferenceService is the first.
_DESCRIPTORS = tuple(
    service
    for file in (inference_pb2, mix_pb2, adapter_pb2, server_pb2, audit_pb2)
    for service in file.DESCRIPTOR.services_by_name.values()
)
_SERVICES = tuple(service.full_name for service in _DESCRIPTORS)


class GrpcDoor:
    """Serves superpose.v1; see `Door`."""

    def __init__(
        self,
        runtime: Runtime,
        inference: Inference,
        access: Access,
        tls: Tls | None,
        flag: str = "listen",
    ) -> None:
        """Serve from these whom `access` lets in, over `tls` if there is one.

        `flag` is the one that says the address, without its dashes.
        """
        calm_departures()
        self.address = ""
        self._tls = tls
        self._flag = flag
        self._listen = runtime.config.addresses[flag]
        described = [*_DESCRIPTORS, *health_pb2.DESCRIPTOR.services_by_name.values()]
        if runtime.config.reflection:
            described += describe_reflection()
        self._health = health.aio.HealthServicer()  # type: ignore[attr-defined]  # types lack it
        self._server = server = grpc.aio.server(
            interceptors=[
                ErrorInterceptor(runtime.metrics.request_failed),
                AccessInterceptor(access, needs_of_methods(described)),
            ],
            options=[
                (
                    "grpc.max_receive_message_length",
                    runtime.adapter_limits.max_bytes + PUSH_MARGIN_MIB * MIB,
                ),
                # Two servers on one port would each get a part of the requests.
                ("grpc.so_reuseport", 0),
                # A client whose machine is gone says nothing; its rows should not run on.
                ("grpc.keepalive_time_ms", 60_000),
                ("grpc.keepalive_timeout_ms", 20_000),
                # Nor should a connection stay that never says a word of HTTP/2.
                ("grpc.server_handshake_timeout_ms", 30_000),
            ],
        )
        inference_pb2_grpc.add_InferenceServiceServicer_to_server(
            InferenceService(inference), server
        )
        mix_pb2_grpc.add_MixServiceServicer_to_server(MixService(runtime, inference), server)
        adapter_pb2_grpc.add_AdapterServiceServicer_to_server(
            AdapterService(runtime, inference), server
        )
        server_pb2_grpc.add_ServerServiceServicer_to_server(ServerService(runtime), server)
        audit_pb2_grpc.add_AuditServiceServicer_to_server(AuditService(runtime), server)
        health_pb2_grpc.add_HealthServicer_to_server(self._health, server)
        if runtime.config.reflection:
            serve_reflection([service.full_name for service in described], server)

    async def open(self) -> None:
        """See `Door`."""
        listen = self._listen
        host, _ = split_address(self._flag, listen)
        try:
            if self._tls is None:
                port = self._server.add_insecure_port(listen)
            else:
                port = self._server.add_secure_port(listen, server_credentials(self._tls))
        except RuntimeError as error:
            raise StartupError(
                f"cannot listen on {listen}: choose a free port with --{self._flag}, or 0 for any"
            ) from error
        await self._server.start()
        self.address = join_address(host, port)
        for service in ("", *_SERVICES):
            await self._health.set(service, health_pb2.HealthCheckResponse.SERVING)

    async def tell_intact(self, intact: bool) -> None:
        """See `Door`."""
        status = health_pb2.HealthCheckResponse
        await self._health.set(_SERVICES[0], status.SERVING if intact else status.NOT_SERVING)

    async def tell_ending(self) -> None:
        """See `Door`."""
        await self._health.enter_graceful_shutdown()

    async def close(self) -> None:
        """See `Door`."""
        await self._server.stop(CLOSING_SECONDS)

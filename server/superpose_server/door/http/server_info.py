"""What runs here, and whether it lives and serves, for people and for probes."""

from __future__ import annotations

from starlette.requests import Request
from starlette.responses import Response

from superpose_proto.v1 import server_pb2 as pb
from superpose_server.door.contract.server_service import ServerService
from superpose_server.door.http.endpoint import Endpoint
from superpose_server.door.http.fields import Asked
from superpose_server.door.http.json_text import json_answer
from superpose_server.door.http.message import plain, schema
from superpose_server.runtime import Runtime

_STATUS = {
    "type": "object",
    "properties": {"status": {"enum": ["SERVING", "NOT_SERVING"]}},
    "required": ["status"],
}


class ServerInfo:
    """ServerService over HTTP; and health, in the words of grpc.health.v1."""

    def __init__(self, runtime: Runtime) -> None:
        """Serve from `runtime`."""
        self._runtime = runtime
        self._service = ServerService(runtime)

    def endpoints(self) -> tuple[Endpoint, ...]:
        """Return what is served."""
        return (
            Endpoint(
                "GET",
                "/v1/server",
                self.get,
                "Version, base, limits and load.",
                reply=schema(pb.GetServerInfoResponse.DESCRIPTOR),
            ),
            Endpoint("GET", "/healthz", self.alive, "Whether the process lives.", reply=_STATUS),
            Endpoint(
                "GET",
                "/readyz",
                self.ready,
                "Whether texts are served: 503 when ending, or with damaged weights.",
                reply=_STATUS,
            ),
        )

    async def get(self, request: Request, asked: Asked) -> Response:
        """Return version, base, limits and load."""
        message = pb.GetServerInfoRequest()
        return json_answer(plain(await self._service.GetServerInfo(message, None)))

    async def alive(self, request: Request, asked: Asked) -> Response:
        """Answer, which is all that is asked."""
        return json_answer({"status": "SERVING"})

    async def ready(self, request: Request, asked: Asked) -> Response:
        """Say what the gRPC door's health says of its InferenceService."""
        integrity = self._runtime.integrity
        if integrity.intact and not integrity.hopeless and not self._runtime.ending.is_set():
            return json_answer({"status": "SERVING"})
        return json_answer({"status": "NOT_SERVING"}, 503)

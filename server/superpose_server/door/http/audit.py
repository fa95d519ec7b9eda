"""`/v1/audit`: AuditService over HTTP, in its own messages."""

from __future__ import annotations

from starlette.requests import Request
from starlette.responses import Response

from superpose_proto.v1 import audit_pb2 as pb
from superpose_server.door.contract.audit_service import AuditService
from superpose_server.door.http.endpoint import Endpoint
from superpose_server.door.http.fields import DIGITS, Asked, Field, Form
from superpose_server.door.http.json_text import json_answer
from superpose_server.door.http.message import plain, schema
from superpose_server.runtime import Runtime

_LIMIT = Field("limit", DIGITS, "At most so many, from 1 to 1000; 100 if absent.")


class Changes:
    """The record of changes."""

    def __init__(self, runtime: Runtime) -> None:
        """Serve from `runtime`."""
        self._service = AuditService(runtime)

    def endpoints(self) -> tuple[Endpoint, ...]:
        """Return what is served."""
        return (
            Endpoint(
                "GET",
                "/v1/audit",
                self.list,
                "The newest changes that operators made, the latest last.",
                query=Form("query", (_LIMIT,)),
                reply=schema(pb.ListChangesResponse.DESCRIPTOR),
            ),
        )

    async def list(self, request: Request, asked: Asked) -> Response:
        """List changes."""
        message = pb.ListChangesRequest(limit=asked.get("limit"))
        return json_answer(plain(await self._service.ListChanges(message, None)))

"""AuditService: who changed what."""

from __future__ import annotations

import asyncio
from dataclasses import asdict
from typing import Any

from superpose_proto.v1 import audit_pb2 as pb
from superpose_proto.v1 import audit_pb2_grpc
from superpose_server.errors import InvalidArgument
from superpose_server.runtime import Runtime

MOST_CHANGES = 1000
_USUAL_CHANGES = 100


class AuditService(audit_pb2_grpc.AuditServiceServicer):
    """Reads the record of changes."""

    def __init__(self, runtime: Runtime) -> None:
        """Serve from `runtime`."""
        self._audit = runtime.audit

    async def ListChanges(
        self, request: pb.ListChangesRequest, context: Any
    ) -> pb.ListChangesResponse:
        """Return the newest changes."""
        limit = request.limit if request.HasField("limit") else _USUAL_CHANGES
        if not 1 <= limit <= MOST_CHANGES:
            raise InvalidArgument(
                f"limit is {limit}: use 1 to {MOST_CHANGES}", "BAD_LIMIT", field="limit"
            )
        changes = await asyncio.to_thread(self._audit.newest, limit)
        return pb.ListChangesResponse(changes=[pb.Change(**asdict(each)) for each in changes])

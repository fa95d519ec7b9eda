"""`/v1/adapters`: AdapterService over HTTP, call by call, in its own messages."""

from __future__ import annotations

import asyncio

from starlette.requests import Request
from starlette.responses import Response

from superpose_proto.v1 import adapter_pb2 as pb
from superpose_server.config import PUSH_MARGIN_MIB
from superpose_server.door.contract.adapter_service import AdapterService
from superpose_server.door.http.endpoint import Endpoint
from superpose_server.door.http.fields import SWITCH, Asked, Field, Form
from superpose_server.door.http.json_text import json_answer
from superpose_server.door.http.message import plain, schema
from superpose_server.door.http.upload import File, Upload
from superpose_server.model.memory import MIB
from superpose_server.runtime import Runtime

_CONFIG, _TENSORS = "adapter_config.json", "adapter_model.safetensors"
_TRAINING = "training.json"
_REPLACE = Field("replace", SWITCH, "Whether other bytes of the same name are replaced.")


class Adapters:
    """The adapters that domains name."""

    def __init__(self, runtime: Runtime) -> None:
        """Serve from `runtime`."""
        self._service = AdapterService(runtime)
        self._upload = Upload(
            "PushAdapterRequest",
            (
                File(_CONFIG, "As PEFT writes it."),
                File(_TENSORS, "As PEFT writes it."),
                File(_TRAINING, "As superpose-train writes it.", required=False),
            ),
            # As much as one message of gRPC.
            runtime.adapter_limits.max_bytes + PUSH_MARGIN_MIB * MIB,
        )

    def endpoints(self) -> tuple[Endpoint, ...]:
        """Return what is served."""
        return (
            Endpoint(
                "GET",
                "/v1/adapters",
                self.list,
                "All adapters, without their modules, configs and warnings.",
                reply=schema(pb.ListAdaptersResponse.DESCRIPTOR),
            ),
            Endpoint(
                "GET",
                "/v1/adapters/{domain}",
                self.get,
                "One adapter.",
                reply=schema(pb.GetAdapterResponse.DESCRIPTOR),
            ),
            Endpoint(
                "PUT",
                "/v1/adapters/{domain}",
                self.push,
                "Load an adapter under a name and keep it; the same bytes again change nothing.",
                self._upload,
                Form("query", (_REPLACE,)),
                reply=schema(pb.PushAdapterResponse.DESCRIPTOR),
            ),
            Endpoint(
                "DELETE",
                "/v1/adapters/{domain}",
                self.delete,
                "Forget an adapter that was pushed.",
                reply=schema(pb.DeleteAdapterResponse.DESCRIPTOR),
            ),
        )

    async def list(self, request: Request, asked: Asked) -> Response:
        """List adapters."""
        message = pb.ListAdaptersRequest()
        return json_answer(plain(await self._service.ListAdapters(message, None)))

    async def get(self, request: Request, asked: Asked) -> Response:
        """Show an adapter."""
        message = pb.GetAdapterRequest(domain=request.path_params["domain"])
        return json_answer(plain(await self._service.GetAdapter(message, None)))

    async def push(self, request: Request, asked: Asked) -> Response:
        """Load and keep an adapter."""

        def message() -> pb.PushAdapterRequest:
            return pb.PushAdapterRequest(
                domain=request.path_params["domain"],
                config=asked[_CONFIG],
                tensors=asked[_TENSORS],
                training=asked.get(_TRAINING, b""),
                replace=asked.get("replace", False),
            )

        # Beside the event loop, since it copies all of the tensors.
        pushed = await self._service.PushAdapter(await asyncio.to_thread(message), None)
        return json_answer(plain(pushed))

    async def delete(self, request: Request, asked: Asked) -> Response:
        """Forget an adapter."""
        message = pb.DeleteAdapterRequest(domain=request.path_params["domain"])
        return json_answer(plain(await self._service.DeleteAdapter(message, None)))

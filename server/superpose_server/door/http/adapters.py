"""`/v1/adapters`: AdapterService over HTTP, call by call, in its own messages."""

from __future__ import annotations

import asyncio

from starlette.requests import Request
from starlette.responses import Response

from superpose_adapters.merge.methods import METHODS
from superpose_proto.v1 import adapter_pb2 as pb
from superpose_server.config import PUSH_MARGIN_MIB
from superpose_server.door.contract.adapter_service import AdapterService
from superpose_server.door.contract.options import options_to_wire
from superpose_server.door.http.connection import while_connected
from superpose_server.door.http.endpoint import Endpoint
from superpose_server.door.http.fields import FLAG, SWITCH, TEXT, Asked, Field, Form
from superpose_server.door.http.json_text import json_answer
from superpose_server.door.http.message import plain, schema
from superpose_server.door.http.mix import MIX, mix_message
from superpose_server.door.http.options import OPTIONS
from superpose_server.door.http.upload import File, Upload
from superpose_server.inference.inference import Inference
from superpose_server.model.memory import MIB
from superpose_server.runtime import Runtime

_CONFIG, _TENSORS = "adapter_config.json", "adapter_model.safetensors"
_TRAINING = "training.json"
_REPLACE = Field("replace", SWITCH, "Whether other bytes of the same name are replaced.")
_MERGE = Form(
    "MergeAdaptersRequest",
    (
        MIX,
        Field("method", TEXT, f"How: one of {', '.join(METHODS)}.", required=True),
        Field("options", OPTIONS, "Options of the method; those left out have their defaults."),
        Field("replace", FLAG, "Whether another adapter of the same name is replaced."),
    ),
)


class Adapters:
    """The adapters that domains name."""

    def __init__(self, runtime: Runtime, inference: Inference) -> None:
        """Serve from these."""
        self._service = AdapterService(runtime, inference)
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
            Endpoint(
                "POST",
                "/v1/adapters/{domain}/merge",
                self.merge,
                "Merge the adapters of a mix into one, and keep that under a name.",
                _MERGE,
                reply=schema(pb.MergeAdaptersResponse.DESCRIPTOR),
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

    async def merge(self, request: Request, asked: Asked) -> Response:
        """Merge adapters, unless the client goes away before."""
        message = pb.MergeAdaptersRequest(
            domain=request.path_params["domain"],
            mix=mix_message(asked),
            method=asked["method"],
            options=options_to_wire(asked.get("options", {})),
            replace=asked.get("replace", False),
        )
        merging = self._service.MergeAdapters(message, None)
        return json_answer(plain(await while_connected(request.receive, merging)))

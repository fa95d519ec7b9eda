"""AdapterService: the adapters that domains name."""

from __future__ import annotations

from typing import Any

from superpose_proto.v1 import adapter_pb2 as pb
from superpose_proto.v1 import adapter_pb2_grpc
from superpose_server.door.contract.convert import adapter_to_wire, merge_from_wire
from superpose_server.inference.inference import Inference
from superpose_server.runtime import Runtime


class AdapterService(adapter_pb2_grpc.AdapterServiceServicer):
    """Reads come from the registry, changes go to the operator thread, merges through inference."""

    def __init__(self, runtime: Runtime, inference: Inference) -> None:
        """Serve from these."""
        self._runtime = runtime
        self._inference = inference

    async def ListAdapters(
        self, request: pb.ListAdaptersRequest, context: Any
    ) -> pb.ListAdaptersResponse:
        """Return all adapters, in ascending order of domain."""
        default = self._runtime.default_mix.state.mix
        return pb.ListAdaptersResponse(
            adapters=[
                adapter_to_wire(registered, default, whole=False)
                for registered in self._runtime.registry.all()
            ]
        )

    async def GetAdapter(
        self, request: pb.GetAdapterRequest, context: Any
    ) -> pb.GetAdapterResponse:
        """Return one adapter with its modules and config."""
        registered = self._runtime.registry.get(request.domain)
        default = self._runtime.default_mix.state.mix
        return pb.GetAdapterResponse(adapter=adapter_to_wire(registered, default, whole=True))

    async def PushAdapter(
        self, request: pb.PushAdapterRequest, context: Any
    ) -> pb.PushAdapterResponse:
        """Check an adapter, store it and serve it."""
        registered, state = await self._runtime.operate(
            lambda operator: operator.push(
                request.domain,
                request.config,
                request.tensors,
                request.replace,
                request.training,
            )
        )
        return pb.PushAdapterResponse(
            adapter=adapter_to_wire(registered, state.mix, whole=True),
            generation=state.generation,
        )

    async def DeleteAdapter(
        self, request: pb.DeleteAdapterRequest, context: Any
    ) -> pb.DeleteAdapterResponse:
        """Forget a pushed adapter."""
        await self._runtime.operate(lambda operator: operator.delete(request.domain))
        return pb.DeleteAdapterResponse()

    async def MergeAdapters(
        self, request: pb.MergeAdaptersRequest, context: Any
    ) -> pb.MergeAdaptersResponse:
        """Merge adapters into one, store it and serve it."""
        merged = await self._inference.merge(merge_from_wire(request))
        return pb.MergeAdaptersResponse(
            adapter=adapter_to_wire(merged.registered, merged.mix.mix, whole=True),
            generation=merged.mix.generation,
            seconds=merged.seconds,
            deviation=merged.deviation,
        )

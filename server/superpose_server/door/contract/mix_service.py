"""MixService: the default mix, and what can be asked about mixes and weights."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

from superpose_adapters.geometry import DomainSize, Overlap, module_type, rms
from superpose_proto.v1 import mix_pb2 as pb
from superpose_proto.v1 import mix_pb2_grpc
from superpose_server.control.default_mix import MixState
from superpose_server.control.watch import watch
from superpose_server.door.contract.convert import (
    mix_from_wire,
    mix_to_wire,
    named_mix_to_wire,
    requested_mix,
)
from superpose_server.errors import InvalidArgument
from superpose_server.inference.inference import Inference
from superpose_server.runtime import Runtime


class MixService(mix_pb2_grpc.MixServiceServicer):
    """Changes go to the operator thread, one after the other; questions to the inference layer."""

    def __init__(self, runtime: Runtime, inference: Inference) -> None:
        """Serve from these."""
        self._runtime = runtime
        self._inference = inference

    async def AddDomain(self, request: pb.AddDomainRequest, context: Any) -> pb.AddDomainResponse:
        """Add a domain to the default mix."""
        weight = request.weight if request.HasField("weight") else 1.0
        expected = request.expected_generation if request.HasField("expected_generation") else None
        state = await self._runtime.operate(
            lambda operator: operator.add(request.domain, weight, expected)
        )
        return pb.AddDomainResponse(mix=mix_to_wire(state))

    async def RemoveDomain(
        self, request: pb.RemoveDomainRequest, context: Any
    ) -> pb.RemoveDomainResponse:
        """Remove a domain from the default mix."""
        expected = request.expected_generation if request.HasField("expected_generation") else None
        state = await self._runtime.operate(
            lambda operator: operator.remove(request.domain, expected)
        )
        return pb.RemoveDomainResponse(mix=mix_to_wire(state))

    async def SetMix(self, request: pb.SetMixRequest, context: Any) -> pb.SetMixResponse:
        """Make a mix the default mix."""
        if not request.HasField("mix"):
            raise InvalidArgument(
                "mix is absent, which means the default mix: name the mix to set, "
                "an empty one for the base model",
                "MIX_ABSENT",
                field="mix",
            )
        mix = mix_from_wire(request.mix)
        expected = request.expected_generation if request.HasField("expected_generation") else None
        state = await self._runtime.operate(lambda operator: operator.set(mix, expected))
        return pb.SetMixResponse(mix=mix_to_wire(state))

    async def GetMix(self, request: pb.GetMixRequest, context: Any) -> pb.GetMixResponse:
        """Return the default mix and what is in the weights."""
        state = self._runtime.default_mix.state
        resident = MixState(state.generation, self._runtime.engine.resident)
        return pb.GetMixResponse(mix=mix_to_wire(state), resident=mix_to_wire(resident))

    async def WatchMix(
        self, request: pb.WatchMixRequest, context: Any
    ) -> AsyncGenerator[pb.WatchMixResponse]:
        """Send the current mix, then every change."""
        async with aclosing(watch(self._runtime.default_mix, self._runtime.ending)) as states:
            async for state in states:
                yield pb.WatchMixResponse(mix=mix_to_wire(state))

    async def AnalyzeMix(
        self, request: pb.AnalyzeMixRequest, context: Any
    ) -> pb.AnalyzeMixResponse:
        """Report how the domains of a mix interfere."""
        analysis = await self._inference.analyze(requested_mix(request))
        geometry = analysis.geometry
        return pb.AnalyzeMixResponse(
            mix=mix_to_wire(analysis.mix),
            domains=[_domain_to_wire(size) for size in geometry.sizes],
            pairs=[_pair_to_wire(pair) for pair in geometry.overlaps],
            interference_ratio=geometry.interference.ratio,
            fold_error=analysis.fold_error,
            folded=analysis.folded,
            warnings=geometry.warnings,
            longest_stall_seconds=analysis.longest_stall_seconds,
        )

    async def VerifyWeights(
        self, request: pb.VerifyWeightsRequest, context: Any
    ) -> pb.VerifyWeightsResponse:
        """Compare the resident weights with a fresh fold, base and adapters with their hashes."""
        verified = await self._inference.verify()
        found = verified.found
        base = self._runtime.base
        return pb.VerifyWeightsResponse(
            ok=found.ok,
            mix=mix_to_wire(verified.mix),
            base_digest=base.digest,
            resident_hash=found.resident_hash,
            dtype=base.dtype,
            device=base.device,
            damaged_resident=found.findings.damaged_resident,
            damaged_base=found.findings.damaged_base,
            damaged_adapters=found.findings.damaged_adapters,
            longest_stall_seconds=verified.longest_stall_seconds,
        )

    async def NameMix(self, request: pb.NameMixRequest, context: Any) -> pb.NameMixResponse:
        """Let a name stand for a mix."""
        mix = requested_mix(request)
        named = await self._runtime.operate(lambda operator: operator.name_mix(request.name, mix))
        return pb.NameMixResponse(named_mix=named_mix_to_wire(named))

    async def UnnameMix(self, request: pb.UnnameMixRequest, context: Any) -> pb.UnnameMixResponse:
        """Take the name of a mix away."""
        await self._runtime.operate(lambda operator: operator.unname_mix(request.name))
        return pb.UnnameMixResponse()

    async def ListNamedMixes(
        self, request: pb.ListNamedMixesRequest, context: Any
    ) -> pb.ListNamedMixesResponse:
        """Return all named mixes, in ascending order of name."""
        return pb.ListNamedMixesResponse(
            named_mixes=map(named_mix_to_wire, self._runtime.registry.named_mixes.all())
        )


def _domain_to_wire(size: DomainSize) -> pb.DomainAnalysis:
    return pb.DomainAnalysis(
        domain=size.domain,
        weight=size.weight,
        delta_norm=abs(size.weight) * size.norm,
        relative_norm=abs(size.weight) * size.relative,
        modules=len(size.relative_by_module),
    )


def _pair_to_wire(pair: Overlap) -> pb.PairAnalysis:
    floors: dict[str, list[float]] = {}
    for module, floor in pair.floors.items():
        floors.setdefault(module_type(module), []).append(floor)
    return pb.PairAnalysis(
        first=pair.first,
        second=pair.second,
        cosine_rms=pair.rms,
        random_floor=pair.floor,
        module_types=[
            pb.ModuleTypeCosine(module_type=name, cosine_rms=value, random_floor=rms(floors[name]))
            for name, value in pair.rms_by_type.items()
        ],
        modules=[
            pb.ModuleCosine(module=module, cosine=cosine) for module, cosine in pair.cosines.items()
        ],
    )

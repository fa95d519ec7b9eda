"""MixService: the default mix, and what can be asked about mixes and weights."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

from superpose_adapters.geometry import DomainSize, Overlap, module_type, rms
from superpose_proto.v1 import mix_pb2 as pb
from superpose_proto.v1 import mix_pb2_grpc
from superpose_server.control.default_mix import MixState
from superpose_server.door.convert import mix_from_wire, mix_to_wire, state_to_wire
from superpose_server.errors import InvalidArgument, ShuttingDown, WatchBehind
from superpose_server.runtime import Runtime

# Changes that a watcher may be behind before it is told to start again.
_MAX_BEHIND = 1024


class MixService(mix_pb2_grpc.MixServiceServicer):
    """Changes go to the operator thread, one after the other."""

    def __init__(self, runtime: Runtime) -> None:
        """Serve from `runtime`."""
        self._runtime = runtime

    async def AddDomain(self, request: pb.AddDomainRequest, context: Any) -> pb.AddDomainResponse:
        """Add a domain to the default mix."""
        weight = request.weight if request.HasField("weight") else 1.0
        expected = request.expected_generation if request.HasField("expected_generation") else None
        state = await self._runtime.operate(
            lambda operator: operator.add(request.domain, weight, expected)
        )
        return pb.AddDomainResponse(mix=state_to_wire(state))

    async def RemoveDomain(
        self, request: pb.RemoveDomainRequest, context: Any
    ) -> pb.RemoveDomainResponse:
        """Remove a domain from the default mix."""
        expected = request.expected_generation if request.HasField("expected_generation") else None
        state = await self._runtime.operate(
            lambda operator: operator.remove(request.domain, expected)
        )
        return pb.RemoveDomainResponse(mix=state_to_wire(state))

    async def SetMix(self, request: pb.SetMixRequest, context: Any) -> pb.SetMixResponse:
        """Make a mix the default mix."""
        if not request.HasField("mix"):
            raise InvalidArgument(
                "mix is absent: send an empty mix to set the base model", "MIX_ABSENT", field="mix"
            )
        mix = mix_from_wire(request.mix)
        expected = request.expected_generation if request.HasField("expected_generation") else None
        state = await self._runtime.operate(lambda operator: operator.set(mix, expected))
        return pb.SetMixResponse(mix=state_to_wire(state))

    async def GetMix(self, request: pb.GetMixRequest, context: Any) -> pb.GetMixResponse:
        """Return the default mix and what is in the weights."""
        state = self._runtime.default_mix.state
        return pb.GetMixResponse(
            mix=state_to_wire(state),
            resident=mix_to_wire(state.generation, self._runtime.engine.resident),
        )

    async def WatchMix(
        self, request: pb.WatchMixRequest, context: Any
    ) -> AsyncIterator[pb.WatchMixResponse]:
        """Send the current mix, then every change."""
        loop = asyncio.get_running_loop()
        changes: asyncio.Queue[MixState] = asyncio.Queue()
        default = self._runtime.default_mix

        def put(state: MixState) -> None:
            # One more than allowed ends the watch; what comes after that is not kept.
            if changes.qsize() <= _MAX_BEHIND:
                changes.put_nowait(state)

        def watcher(state: MixState) -> None:
            loop.call_soon_threadsafe(put, state)

        unwatch = default.watch(watcher)
        try:
            # Watching began before the state is read, so no change falls between; what is in
            # both is sent once.
            state = default.state
            yield pb.WatchMixResponse(mix=state_to_wire(state))
            while True:
                if changes.qsize() > _MAX_BEHIND:
                    raise WatchBehind(_MAX_BEHIND)
                change = await self._next_change(changes)
                if change is None:
                    raise ShuttingDown
                if change.generation > state.generation:
                    state = change
                    yield pb.WatchMixResponse(mix=state_to_wire(state))
        finally:
            unwatch()

    async def _next_change(self, changes: asyncio.Queue[MixState]) -> MixState | None:
        """Return the next change, or None when the server shuts down."""
        change = asyncio.ensure_future(changes.get())
        ending = asyncio.ensure_future(self._runtime.ending.wait())
        try:
            await asyncio.wait((change, ending), return_when=asyncio.FIRST_COMPLETED)
            return change.result() if change.done() else None
        finally:
            change.cancel()
            ending.cancel()

    async def AnalyzeMix(
        self, request: pb.AnalyzeMixRequest, context: Any
    ) -> pb.AnalyzeMixResponse:
        """Report how the domains of a mix interfere."""
        runtime = self._runtime
        state = runtime.default_mix.state
        bound = state.mix
        if request.HasField("mix"):
            bound = runtime.registry.bind(mix_from_wire(request.mix))
        prepared = await runtime.operate(lambda operator: operator.prepare(bound))
        measured = await asyncio.wrap_future(runtime.engine.measure_fold_error(prepared))
        analysis = await runtime.operate(lambda operator: operator.analyze(prepared))
        return pb.AnalyzeMixResponse(
            mix=mix_to_wire(state.generation, bound),
            domains=[_domain_to_wire(size) for size in analysis.sizes],
            pairs=[_pair_to_wire(pair) for pair in analysis.overlaps],
            interference_ratio=analysis.interference.ratio,
            fold_error=measured.value,
            folded=prepared.foldable,
            warnings=analysis.warnings,
            longest_stall_seconds=measured.longest_stall_seconds,
        )

    async def VerifyWeights(
        self, request: pb.VerifyWeightsRequest, context: Any
    ) -> pb.VerifyWeightsResponse:
        """Compare the resident weights with a fresh fold, and the base with its hash."""
        runtime = self._runtime
        generation = runtime.default_mix.state.generation
        result = await runtime.verify()
        found = result.value
        model = runtime.model
        return pb.VerifyWeightsResponse(
            ok=found.ok,
            mix=mix_to_wire(generation, found.mix),
            base_digest=model.base_digest,
            resident_hash=found.resident_hash,
            dtype=str(model.dtype).removeprefix("torch."),
            device=str(model.device),
            damaged_resident=found.damaged_resident,
            damaged_base=found.damaged_base,
            longest_stall_seconds=result.longest_stall_seconds,
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

"""Every call of the contract: what it sends, what it makes of the answer, how long it may take.

Both clients run these; neither builds a message or reads one.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from os import PathLike
from typing import Any, Generic, TypeVar

from google.protobuf.message import Message
from grpc_health.v1 import health_pb2, health_pb2_grpc

from superpose_client import requests
from superpose_client.mix import MixLike
from superpose_client.requests import AdapterFiles, GenerateOptions, Prompt, ScoreBatches
from superpose_client.results import (
    AdapterInfo,
    Analysis,
    CurrentMix,
    Generation,
    GenerationChunk,
    HealthStatus,
    MixState,
    PushResult,
    ServerInfo,
    Verification,
)
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

DEFAULT_TARGET = "127.0.0.1:50051"

_CONTROL = 60.0  # seconds, for calls that look something up or change the mix
_WORK = 600.0  # seconds, for calls that compute
_UNLIMITED = math.inf

# The largest adapter that can be pushed, and room for the rest of the message.
_MAX_MESSAGE_BYTES = requests.MAX_ADAPTER_BYTES + 2**20

# No retry policy: the caller decides, because an add or a remove that is sent twice does not mean
# what it meant once.
CHANNEL_OPTIONS = (
    ("grpc.max_send_message_length", _MAX_MESSAGE_BYTES),
    ("grpc.max_receive_message_length", _MAX_MESSAGE_BYTES),
    # A gRPC server by default hangs up on clients that ping an idle stream (`watch`) more often
    # than every 5 minutes; common load balancers drop connections idle for somewhat longer.
    ("grpc.keepalive_time_ms", 330_000),
    ("grpc.keepalive_timeout_ms", 20_000),
)

R = TypeVar("R")


class Stubs:
    """The stubs of all services on one channel, of `grpc` or of `grpc.aio`."""

    def __init__(self, channel: Any) -> None:
        """Make the stubs; nothing is sent."""
        self._stubs: dict[str, Any] = {
            "Inference": inference_pb2_grpc.InferenceServiceStub(channel),
            "Mix": mix_pb2_grpc.MixServiceStub(channel),
            "Adapter": adapter_pb2_grpc.AdapterServiceStub(channel),
            "Server": server_pb2_grpc.ServerServiceStub(channel),
            "Health": health_pb2_grpc.HealthStub(channel),
        }

    def start(self, call: "Call[Any]", timeout: float | None) -> Any:
        """Invoke a call; `timeout` takes the place of the call's own unless it is None."""
        seconds = call.timeout if timeout is None else timeout
        service, method = call.method.split(".")
        # gRPC writes no deadline as None, and takes no infinity.
        return getattr(self._stubs[service], method)(
            call.request, timeout=None if math.isinf(seconds) else seconds
        )


@dataclass(frozen=True)
class Call(Generic[R]):
    """One call: `method` is Service.Method; `convert` turns a response into the result."""

    method: str
    request: Message
    convert: Callable[[Any], R]
    timeout: float = _CONTROL


def generate(
    prompt: Prompt, mix: MixLike | None, request_id: str, options: GenerateOptions
) -> Call[Generation]:
    """Generate."""
    request = requests.generate(inference_pb2.GenerateRequest, prompt, mix, request_id, options)
    return Call("Inference.Generate", request, Generation.from_proto, _WORK)


def stream(
    prompt: Prompt, mix: MixLike | None, request_id: str, options: GenerateOptions
) -> Call[GenerationChunk]:
    """GenerateStream."""
    kind = inference_pb2.GenerateStreamRequest
    request = requests.generate(kind, prompt, mix, request_id, options)
    return Call("Inference.GenerateStream", request, GenerationChunk.from_proto, _UNLIMITED)


def score(batches: ScoreBatches) -> Iterator[Call[int]]:
    """Score, request after request; each result is the number of texts scored so far."""
    for request in batches:
        yield Call("Inference.Score", request, batches.add, _WORK)


def add(domain: str, weight: float | None, expected_generation: int | None) -> Call[MixState]:
    """AddDomain."""
    request = mix_pb2.AddDomainRequest(
        domain=domain, weight=weight, expected_generation=expected_generation
    )
    return Call("Mix.AddDomain", request, _mix_of)


def remove(domain: str, expected_generation: int | None) -> Call[MixState]:
    """RemoveDomain."""
    request = mix_pb2.RemoveDomainRequest(domain=domain, expected_generation=expected_generation)
    return Call("Mix.RemoveDomain", request, _mix_of)


def set_mix(mix: MixLike, expected_generation: int | None) -> Call[MixState]:
    """SetMix."""
    request = mix_pb2.SetMixRequest(mix=requests.mix(mix), expected_generation=expected_generation)
    return Call("Mix.SetMix", request, _mix_of)


def get_mix() -> Call[CurrentMix]:
    """GetMix."""
    return Call("Mix.GetMix", mix_pb2.GetMixRequest(), CurrentMix.from_proto)


def watch() -> Call[MixState]:
    """WatchMix."""
    return Call("Mix.WatchMix", mix_pb2.WatchMixRequest(), _mix_of, _UNLIMITED)


def analyze(mix: MixLike | None) -> Call[Analysis]:
    """AnalyzeMix."""
    request = mix_pb2.AnalyzeMixRequest(mix=requests.mix(mix))
    return Call("Mix.AnalyzeMix", request, Analysis.from_proto, _WORK)


def verify() -> Call[Verification]:
    """VerifyWeights."""
    request = mix_pb2.VerifyWeightsRequest()
    return Call("Mix.VerifyWeights", request, Verification.from_proto, _WORK)


def adapters() -> Call[tuple[AdapterInfo, ...]]:
    """ListAdapters."""
    return Call(
        "Adapter.ListAdapters",
        adapter_pb2.ListAdaptersRequest(),
        lambda response: tuple(AdapterInfo.from_proto(a) for a in response.adapters),
    )


def adapter(domain: str) -> Call[AdapterInfo]:
    """GetAdapter."""
    return Call(
        "Adapter.GetAdapter",
        adapter_pb2.GetAdapterRequest(domain=domain),
        lambda response: AdapterInfo.from_proto(response.adapter),
    )


def push(
    domain: str, adapter: str | PathLike[str] | AdapterFiles, replace: bool
) -> Call[PushResult]:
    """PushAdapter; reads the folder."""
    files = adapter if isinstance(adapter, AdapterFiles) else AdapterFiles.read(adapter)
    request = adapter_pb2.PushAdapterRequest(
        domain=domain, config=files.config, tensors=files.tensors, replace=replace
    )
    return Call("Adapter.PushAdapter", request, PushResult.from_proto, _WORK)


def delete(domain: str) -> Call[None]:
    """DeleteAdapter."""
    request = adapter_pb2.DeleteAdapterRequest(domain=domain)
    return Call("Adapter.DeleteAdapter", request, lambda _: None)


def info() -> Call[ServerInfo]:
    """GetServerInfo."""
    request = server_pb2.GetServerInfoRequest()
    return Call("Server.GetServerInfo", request, ServerInfo.from_proto)


def health(service: str) -> Call[HealthStatus]:
    """Check of grpc.health.v1."""
    return Call(
        "Health.Check",
        health_pb2.HealthCheckRequest(service=service),
        lambda response: HealthStatus(
            health_pb2.HealthCheckResponse.ServingStatus.Name(response.status)
        ),
    )


def _mix_of(response: Any) -> MixState:
    return MixState.from_proto(response.mix)

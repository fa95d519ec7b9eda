"""What the calls return: frozen dataclasses with the field names of the proto.

All conversions from messages are here, so that both clients agree. A field is None where the
message leaves it out.
"""

from dataclasses import dataclass
from enum import StrEnum
from typing import Self

from superpose_proto.v1 import adapter_pb2, inference_pb2, mix_pb2, server_pb2


class FinishReason(StrEnum):
    """Why a text ended; values are the names on the wire."""

    UNSPECIFIED = "FINISH_REASON_UNSPECIFIED"
    STOP = "FINISH_REASON_STOP"
    LENGTH = "FINISH_REASON_LENGTH"
    ABORTED = "FINISH_REASON_ABORTED"

    @classmethod
    def from_proto(cls, value: int) -> Self:
        """Return the member; a value of a later version reads as unspecified."""
        names: dict[int, str] = {
            number: name for name, number in inference_pb2.FinishReason.items()
        }
        return cls(names.get(value, cls.UNSPECIFIED.value))


class AdapterSource(StrEnum):
    """Where an adapter came from; values are the names on the wire."""

    UNSPECIFIED = "ADAPTER_SOURCE_UNSPECIFIED"
    BUNDLED = "ADAPTER_SOURCE_BUNDLED"
    DIRECTORY = "ADAPTER_SOURCE_DIRECTORY"
    PUSHED = "ADAPTER_SOURCE_PUSHED"

    @classmethod
    def from_proto(cls, value: int) -> Self:
        """Return the member; a value of a later version reads as unspecified."""
        names: dict[int, str] = {number: name for name, number in adapter_pb2.AdapterSource.items()}
        return cls(names.get(value, cls.UNSPECIFIED.value))


class HealthStatus(StrEnum):
    """State of a service after grpc.health.v1."""

    UNKNOWN = "UNKNOWN"
    SERVING = "SERVING"
    NOT_SERVING = "NOT_SERVING"
    SERVICE_UNKNOWN = "SERVICE_UNKNOWN"


@dataclass(frozen=True)
class BoundEntry:
    """One domain of a mix as the server resolved it."""

    domain: str
    weight: float
    adapter_digest: str

    @classmethod
    def from_proto(cls, message: mix_pb2.BoundEntry) -> Self:
        """Convert."""
        return cls(message.domain, message.weight, message.adapter_digest)


@dataclass(frozen=True)
class MixState:
    """A mix, and the generation of the default mix when the request was accepted."""

    generation: int
    digest: str
    entries: tuple[BoundEntry, ...]

    @classmethod
    def from_proto(cls, message: mix_pb2.MixState) -> Self:
        """Convert."""
        entries = tuple(BoundEntry.from_proto(entry) for entry in message.entries)
        return cls(message.generation, message.digest, entries)

    @property
    def weights(self) -> dict[str, float]:
        """The mix as {domain: weight}, which every call takes as its `mix`."""
        return {entry.domain: entry.weight for entry in self.entries}


@dataclass(frozen=True)
class CurrentMix(MixState):
    """The default mix, and beside it the one that is folded into the weights now."""

    resident: MixState

    @classmethod
    def from_response(cls, message: mix_pb2.GetMixResponse) -> Self:
        """Convert."""
        mix = MixState.from_proto(message.mix)
        resident = MixState.from_proto(message.resident)
        return cls(mix.generation, mix.digest, mix.entries, resident)


@dataclass(frozen=True)
class Usage:
    """Tokens of a request."""

    prompt_tokens: int
    completion_tokens: int

    @classmethod
    def from_proto(cls, message: inference_pb2.Usage) -> Self:
        """Convert."""
        return cls(message.prompt_tokens, message.completion_tokens)


@dataclass(frozen=True)
class Generation:
    """A whole text. `logprobs` is empty unless asked for."""

    text: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason
    usage: Usage
    mix: MixState
    logprobs: tuple[float, ...]
    request_id: str

    @classmethod
    def from_proto(cls, message: inference_pb2.GenerateResponse) -> Self:
        """Convert."""
        return cls(
            text=message.text,
            token_ids=tuple(message.token_ids),
            finish_reason=FinishReason.from_proto(message.finish_reason),
            usage=Usage.from_proto(message.usage),
            mix=MixState.from_proto(message.mix),
            logprobs=tuple(message.logprobs),
            request_id=message.request_id,
        )


@dataclass(frozen=True)
class GenerationChunk:
    """What is new since the last chunk. The last one has the finish reason and the usage."""

    text: str
    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    finish_reason: FinishReason
    usage: Usage | None
    mix: MixState | None
    request_id: str

    @classmethod
    def from_proto(cls, message: inference_pb2.GenerateStreamResponse) -> Self:
        """Convert."""
        return cls(
            text=message.text,
            token_ids=tuple(message.token_ids),
            logprobs=tuple(message.logprobs),
            finish_reason=FinishReason.from_proto(message.finish_reason),
            usage=Usage.from_proto(message.usage) if message.HasField("usage") else None,
            mix=MixState.from_proto(message.mix) if message.HasField("mix") else None,
            request_id=message.request_id,
        )


@dataclass(frozen=True)
class ItemScore:
    """Score of one text. `logprob` is a sum; `logprobs` is empty unless asked for."""

    tokens: int
    logprob: float
    perplexity: float
    logprobs: tuple[float, ...]

    @classmethod
    def from_proto(cls, message: inference_pb2.ItemScore) -> Self:
        """Convert."""
        return cls(message.tokens, message.logprob, message.perplexity, tuple(message.logprobs))


@dataclass(frozen=True)
class ScoreResult:
    """Scores in the order of the texts, with the token-weighted perplexity over all of them."""

    items: tuple[ItemScore, ...]
    tokens: int
    perplexity: float
    mix: MixState

    @classmethod
    def from_proto(cls, message: inference_pb2.ScoreResponse) -> Self:
        """Convert."""
        return cls(
            items=tuple(ItemScore.from_proto(item) for item in message.items),
            tokens=message.tokens,
            perplexity=message.perplexity,
            mix=MixState.from_proto(message.mix),
        )


@dataclass(frozen=True)
class AdapterInfo:
    """An adapter. In lists `modules` and `config_json` are empty."""

    domain: str
    digest: str
    source: AdapterSource
    rank: int
    parameters: int
    bytes: int
    modules: tuple[str, ...]
    weight: float
    config_json: str

    @classmethod
    def from_proto(cls, message: adapter_pb2.Adapter) -> Self:
        """Convert."""
        return cls(
            domain=message.domain,
            digest=message.digest,
            source=AdapterSource.from_proto(message.source),
            rank=message.rank,
            parameters=message.parameters,
            bytes=message.bytes,
            modules=tuple(message.modules),
            weight=message.weight,
            config_json=message.config_json,
        )


@dataclass(frozen=True)
class PushResult:
    """The adapter as stored, and the generation of the default mix after the push."""

    adapter: AdapterInfo
    generation: int

    @classmethod
    def from_proto(cls, message: adapter_pb2.PushAdapterResponse) -> Self:
        """Convert."""
        return cls(AdapterInfo.from_proto(message.adapter), message.generation)


@dataclass(frozen=True)
class DomainAnalysis:
    """One domain of an analysed mix: norm of its weighted delta, absolute and over the base."""

    domain: str
    weight: float
    delta_norm: float
    relative_norm: float
    modules: int

    @classmethod
    def from_proto(cls, message: mix_pb2.DomainAnalysis) -> Self:
        """Convert."""
        return cls(
            domain=message.domain,
            weight=message.weight,
            delta_norm=message.delta_norm,
            relative_norm=message.relative_norm,
            modules=message.modules,
        )


@dataclass(frozen=True)
class ModuleCosine:
    """Cosine between two deltas in one module."""

    module: str
    cosine: float

    @classmethod
    def from_proto(cls, message: mix_pb2.ModuleCosine) -> Self:
        """Convert."""
        return cls(message.module, message.cosine)


@dataclass(frozen=True)
class ModuleTypeCosine:
    """Cosine between two deltas over the modules of one type, and what chance would give."""

    module_type: str
    cosine_rms: float
    random_floor: float

    @classmethod
    def from_proto(cls, message: mix_pb2.ModuleTypeCosine) -> Self:
        """Convert."""
        return cls(message.module_type, message.cosine_rms, message.random_floor)


@dataclass(frozen=True)
class PairAnalysis:
    """Two domains of an analysed mix."""

    first: str
    second: str
    cosine_rms: float
    random_floor: float
    module_types: tuple[ModuleTypeCosine, ...]
    modules: tuple[ModuleCosine, ...]

    @classmethod
    def from_proto(cls, message: mix_pb2.PairAnalysis) -> Self:
        """Convert."""
        return cls(
            first=message.first,
            second=message.second,
            cosine_rms=message.cosine_rms,
            random_floor=message.random_floor,
            module_types=tuple(ModuleTypeCosine.from_proto(m) for m in message.module_types),
            modules=tuple(ModuleCosine.from_proto(m) for m in message.modules),
        )


@dataclass(frozen=True)
class Analysis:
    """How the domains of a mix interfere."""

    mix: MixState
    domains: tuple[DomainAnalysis, ...]
    pairs: tuple[PairAnalysis, ...]
    interference_ratio: float
    fold_error: float
    folded: bool
    warnings: tuple[str, ...]
    longest_stall_seconds: float

    @classmethod
    def from_proto(cls, message: mix_pb2.AnalyzeMixResponse) -> Self:
        """Convert."""
        return cls(
            mix=MixState.from_proto(message.mix),
            domains=tuple(DomainAnalysis.from_proto(domain) for domain in message.domains),
            pairs=tuple(PairAnalysis.from_proto(pair) for pair in message.pairs),
            interference_ratio=message.interference_ratio,
            fold_error=message.fold_error,
            folded=message.folded,
            warnings=tuple(message.warnings),
            longest_stall_seconds=message.longest_stall_seconds,
        )


@dataclass(frozen=True)
class Verification:
    """Whether the weights in use are what they should be; `ok` sums it up."""

    ok: bool
    mix: MixState
    base_digest: str
    resident_hash: str
    dtype: str
    device: str
    damaged_resident: tuple[str, ...]
    damaged_base: tuple[str, ...]
    longest_stall_seconds: float

    @classmethod
    def from_proto(cls, message: mix_pb2.VerifyWeightsResponse) -> Self:
        """Convert."""
        return cls(
            ok=message.ok,
            mix=MixState.from_proto(message.mix),
            base_digest=message.base_digest,
            resident_hash=message.resident_hash,
            dtype=message.dtype,
            device=message.device,
            damaged_resident=tuple(message.damaged_resident),
            damaged_base=tuple(message.damaged_base),
            longest_stall_seconds=message.longest_stall_seconds,
        )


@dataclass(frozen=True)
class Limits:
    """What the server takes at most."""

    max_batch: int
    max_queue: int
    max_rank: int
    max_adapter_bytes: int
    max_domains_in_mix: int
    max_score_items: int

    @classmethod
    def from_proto(cls, message: server_pb2.Limits) -> Self:
        """Convert."""
        return cls(
            max_batch=message.max_batch,
            max_queue=message.max_queue,
            max_rank=message.max_rank,
            max_adapter_bytes=message.max_adapter_bytes,
            max_domains_in_mix=message.max_domains_in_mix,
            max_score_items=message.max_score_items,
        )


@dataclass(frozen=True)
class ServerInfo:
    """The server, its base and what it is doing. `mix` is the default mix."""

    version: str
    base: str
    base_digest: str
    dtype: str
    device: str
    context_length: int
    limits: Limits
    running: int
    waiting: int
    mix: MixState
    adapters: int
    uptime_seconds: float
    weights_intact: bool

    @classmethod
    def from_proto(cls, message: server_pb2.GetServerInfoResponse) -> Self:
        """Convert."""
        return cls(
            version=message.version,
            base=message.base,
            base_digest=message.base_digest,
            dtype=message.dtype,
            device=message.device,
            context_length=message.context_length,
            limits=Limits.from_proto(message.limits),
            running=message.running,
            waiting=message.waiting,
            mix=MixState.from_proto(message.mix),
            adapters=message.adapters,
            uptime_seconds=message.uptime_seconds,
            weights_intact=message.weights_intact,
        )

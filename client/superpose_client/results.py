"""What the calls return: frozen dataclasses with the field names of the proto.

`from_message` fills them. A field that may be None is None where the message leaves it out.
"""

from dataclasses import dataclass, field
from enum import StrEnum

from superpose_client.from_message import FromMessage, at
from superpose_proto.v1 import adapter_pb2, audit_pb2, inference_pb2, mix_pb2, server_pb2


class FinishReason(StrEnum):
    """Why a text ended; values are the names on the wire."""

    UNSPECIFIED = "FINISH_REASON_UNSPECIFIED"
    STOP = "FINISH_REASON_STOP"
    LENGTH = "FINISH_REASON_LENGTH"
    ABORTED = "FINISH_REASON_ABORTED"


class AdapterSource(StrEnum):
    """Where an adapter came from; values are the names on the wire."""

    UNSPECIFIED = "ADAPTER_SOURCE_UNSPECIFIED"
    BUNDLED = "ADAPTER_SOURCE_BUNDLED"
    DIRECTORY = "ADAPTER_SOURCE_DIRECTORY"
    PUSHED = "ADAPTER_SOURCE_PUSHED"


class HealthStatus(StrEnum):
    """State of a service after grpc.health.v1."""

    UNKNOWN = "UNKNOWN"
    SERVING = "SERVING"
    NOT_SERVING = "NOT_SERVING"
    SERVICE_UNKNOWN = "SERVICE_UNKNOWN"


@dataclass(frozen=True)
class BoundEntry(FromMessage, message=mix_pb2.BoundEntry):
    """One domain of a mix as the server resolved it."""

    domain: str
    weight: float
    adapter_digest: str


@dataclass(frozen=True)
class MixState(FromMessage, message=mix_pb2.MixState):
    """A mix, and the generation of the default mix when the request was accepted."""

    generation: int
    digest: str
    entries: tuple[BoundEntry, ...]

    @property
    def weights(self) -> dict[str, float]:
        """The mix as {domain: weight}, which every call takes as its `mix`."""
        return {entry.domain: entry.weight for entry in self.entries}


@dataclass(frozen=True)
class CurrentMix(MixState, message=mix_pb2.GetMixResponse):
    """The default mix, and beside it the one that is folded into the weights now."""

    generation: int = field(metadata=at("mix.generation"))
    digest: str = field(metadata=at("mix.digest"))
    entries: tuple[BoundEntry, ...] = field(metadata=at("mix.entries"))
    resident: MixState


@dataclass(frozen=True)
class DomainWeight(FromMessage, message=mix_pb2.DomainWeight):
    """One domain of a named mix."""

    domain: str
    weight: float


@dataclass(frozen=True)
class NamedMix(FromMessage, message=mix_pb2.NamedMix):
    """A mix of domains under a name, which may stand wherever a domain does in a mix."""

    name: str
    entries: tuple[DomainWeight, ...]

    @property
    def weights(self) -> dict[str, float]:
        """The mix as {domain: weight}, which every call takes as its `mix`."""
        return {entry.domain: entry.weight for entry in self.entries}


@dataclass(frozen=True)
class Usage(FromMessage, message=inference_pb2.Usage):
    """Tokens of a request."""

    prompt_tokens: int
    completion_tokens: int


@dataclass(frozen=True)
class TopLogprobs(FromMessage, message=inference_pb2.TopLogprobs):
    """The likeliest tokens in one place, the likeliest first, and their log-probabilities."""

    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]


@dataclass(frozen=True)
class Generation(FromMessage, message=inference_pb2.GenerateResponse):
    """A whole text. `logprobs` and `top_logprobs` are empty unless asked for."""

    text: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason
    usage: Usage
    mix: MixState
    logprobs: tuple[float, ...]
    request_id: str
    top_logprobs: tuple[TopLogprobs, ...]


@dataclass(frozen=True)
class GenerationChunk(FromMessage, message=inference_pb2.GenerateStreamResponse):
    """What is new since the last chunk. The last one has the finish reason and the usage."""

    text: str
    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    finish_reason: FinishReason
    usage: Usage | None
    mix: MixState | None
    request_id: str
    top_logprobs: tuple[TopLogprobs, ...]


@dataclass(frozen=True)
class ItemScore(FromMessage, message=inference_pb2.ItemScore):
    """Score of one text. `logprob` is a sum; `logprobs` is empty unless asked for."""

    tokens: int
    logprob: float
    perplexity: float
    logprobs: tuple[float, ...]


@dataclass(frozen=True)
class MixScore(FromMessage, message=inference_pb2.MixScore):
    """What all texts score under one of several mixes."""

    items: tuple[ItemScore, ...]
    tokens: int
    perplexity: float
    mix: MixState


@dataclass(frozen=True)
class ScoreResult(FromMessage, message=inference_pb2.ScoreResponse):
    """Scores in the order of the texts, with the token-weighted perplexity over all of them.

    Of several `mixes`, where they were asked for, each has a block; the other fields are those of
    the first.
    """

    items: tuple[ItemScore, ...]
    tokens: int
    perplexity: float
    mix: MixState
    mixes: tuple[MixScore, ...]


@dataclass(frozen=True)
class FitProgress(FromMessage, message=inference_pb2.FitProgress):
    """How far a fit is, the best weights so far and what they lose, nats a token."""

    evaluations: int
    budget: int
    weights: tuple[DomainWeight, ...]
    loss: float


@dataclass(frozen=True)
class Estimate(FromMessage, message=inference_pb2.Estimate):
    """A number and its 95 % interval, NaN where there are too few rows for one."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class FitCandidate(FromMessage, message=inference_pb2.FitCandidate):
    """What a mix loses, nats a token; `excess` is the held-out loss over the fitted mix's.

    `held_out_items` are the scores of the rows that were held out, whose places among the texts are
    in `FitResult.held_out`.
    """

    mix: MixState
    fitted_loss: float
    held_out_loss: Estimate
    excess: Estimate
    held_out_items: tuple[ItemScore, ...]


@dataclass(frozen=True)
class FitResult(FromMessage, message=inference_pb2.FitResult):
    """The fitted weights, and what they and the mixes that people try first lose.

    The first of the `candidates` is the fitted mix; its `mix.weights` leaves out what is 0.
    """

    weights: tuple[DomainWeight, ...]
    candidates: tuple[FitCandidate, ...]
    fitted_rows: int
    fitted_tokens: int
    held_out_rows: int
    held_out_tokens: int
    evaluations: int
    warnings: tuple[str, ...]
    held_out: tuple[int, ...]

    @property
    def mix(self) -> MixState:
        """The fitted mix, with the generation of the default mix when the fit began."""
        return self.candidates[0].mix


@dataclass(frozen=True)
class FitUpdate(FromMessage, message=inference_pb2.FitMixResponse):
    """One of the two: progress after each round, the result at the end."""

    progress: FitProgress | None
    result: FitResult | None


@dataclass(frozen=True)
class Provenance(FromMessage, message=adapter_pb2.Provenance):
    """How an adapter was merged: method, all of its options, and what was merged.

    `parts` have the domains as they were called then.
    """

    method: str
    options: dict[str, float | bool | str]
    parts: tuple[BoundEntry, ...]

    @property
    def weights(self) -> dict[str, float]:
        """What was merged as {domain: weight}, which every call takes as its `mix`."""
        return {entry.domain: entry.weight for entry in self.parts}


@dataclass(frozen=True)
class AdapterInfo(FromMessage, message=adapter_pb2.Adapter):
    """An adapter. In lists `modules`, `config_json` and `warnings` are empty.

    `provenance` is None unless the adapter says that it was merged.
    """

    domain: str
    digest: str
    source: AdapterSource
    rank: int
    parameters: int
    bytes: int
    modules: tuple[str, ...]
    weight: float
    config_json: str
    warnings: tuple[str, ...]
    provenance: Provenance | None


@dataclass(frozen=True)
class PushResult(FromMessage, message=adapter_pb2.PushAdapterResponse):
    """The adapter as stored, and the generation of the default mix after the push."""

    adapter: AdapterInfo
    generation: int


@dataclass(frozen=True)
class MergeResult(FromMessage, message=adapter_pb2.MergeAdaptersResponse):
    """The merged adapter as stored, and the generation of the default mix after that.

    `seconds` is how long the merging took; `deviation` how far the merged delta is from the plain
    sum, over the norm of the sum.
    """

    adapter: AdapterInfo
    generation: int
    seconds: float
    deviation: float


@dataclass(frozen=True)
class DomainAnalysis(FromMessage, message=mix_pb2.DomainAnalysis):
    """One domain of an analysed mix: norm of its weighted delta, absolute and over the base."""

    domain: str
    weight: float
    delta_norm: float
    relative_norm: float
    modules: int


@dataclass(frozen=True)
class ModuleCosine(FromMessage, message=mix_pb2.ModuleCosine):
    """Cosine between two deltas in one module."""

    module: str
    cosine: float


@dataclass(frozen=True)
class ModuleTypeCosine(FromMessage, message=mix_pb2.ModuleTypeCosine):
    """Cosine between two deltas over the modules of one type, and what chance would give."""

    module_type: str
    cosine_rms: float
    random_floor: float


@dataclass(frozen=True)
class PairAnalysis(FromMessage, message=mix_pb2.PairAnalysis):
    """Two domains of an analysed mix."""

    first: str
    second: str
    cosine_rms: float
    random_floor: float
    module_types: tuple[ModuleTypeCosine, ...]
    modules: tuple[ModuleCosine, ...]


@dataclass(frozen=True)
class Analysis(FromMessage, message=mix_pb2.AnalyzeMixResponse):
    """How the domains of a mix interfere."""

    mix: MixState
    domains: tuple[DomainAnalysis, ...]
    pairs: tuple[PairAnalysis, ...]
    interference_ratio: float
    fold_error: float
    folded: bool
    warnings: tuple[str, ...]
    longest_stall_seconds: float


@dataclass(frozen=True)
class Verification(FromMessage, message=mix_pb2.VerifyWeightsResponse):
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
    damaged_adapters: tuple[str, ...]


@dataclass(frozen=True)
class Limits(FromMessage, message=server_pb2.Limits):
    """What the server takes at most."""

    max_batch: int
    max_queue: int
    max_rank: int
    max_adapter_bytes: int
    max_domains_in_mix: int
    max_score_items: int
    max_score_rows: int


@dataclass(frozen=True)
class Replica(FromMessage, message=server_pb2.Replica):
    """A process that runs rows of a server.

    `generation` and `digest` are those of the mix that it holds; before its first change, None and
    the digest of the base alone.
    """

    name: str
    node: str
    generation: int | None
    digest: str
    running: int
    waiting: int
    generated_tokens: int
    weights_intact: bool


@dataclass(frozen=True)
class FollowedFile(FromMessage, message=server_pb2.FollowedFile):
    """A file that says what the default mix is; `problem` is why the server is not at that."""

    name: str
    reached: bool
    problem: str


@dataclass(frozen=True)
class ServerInfo(FromMessage, message=server_pb2.GetServerInfoResponse):
    """The server, its base and what it is doing.

    `mix` is the default mix; `generated_tokens` are those of all rows since the start; `followed`
    is None if the server follows no file; `replicas` are those that answer, where it has any.
    """

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
    generated_tokens: int
    chat_template: bool
    grpc_address: str
    followed: FollowedFile | None
    replicas: tuple[Replica, ...]


@dataclass(frozen=True)
class Change(FromMessage, message=audit_pb2.Change):
    """A change that somebody made; `time` is in UTC, `who` a token's name or `anonymous`."""

    time: str
    who: str
    peer: str
    what: str
    generation_before: int
    digest_before: str
    generation: int
    digest: str

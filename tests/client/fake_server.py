"""A gRPC server with scripted answers, which records what it was asked.

It speaks the whole contract but knows no models: each method has a plausible answer that a test
replaces through `answers`.
"""

import math
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent import futures
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Self, cast

import grpc
from google.protobuf import any_pb2, duration_pb2
from google.protobuf.message import Message
from google.rpc import error_details_pb2, status_pb2
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_status import rpc_status

from superpose_proto.v1 import (
    adapter_pb2,
    adapter_pb2_grpc,
    audit_pb2,
    audit_pb2_grpc,
    inference_pb2,
    inference_pb2_grpc,
    mix_pb2,
    mix_pb2_grpc,
    server_pb2,
    server_pb2_grpc,
)

STREAMS = {"GenerateStream", "WatchMix", "FitMix"}
DEFAULT = {"math": 1.0, "medicine": 0.5}
# No double holds this generation exactly, so a reader that goes through one is found out.
GENERATION = 2**53 + 1


@dataclass(frozen=True)
class Failure:
    """A status with the details of design §6."""

    code: grpc.StatusCode
    message: str = "it went wrong"
    reason: str = ""
    metadata: Mapping[str, str] = field(default_factory=dict)
    violations: Mapping[str, str] = field(default_factory=dict)
    retry_after: float | None = None
    domain: str = "superpose"

    def status(self) -> grpc.Status:
        details: list[Message] = []
        if self.reason:
            details.append(
                error_details_pb2.ErrorInfo(
                    reason=self.reason, domain=self.domain, metadata=self.metadata
                )
            )
        if self.violations:
            details.append(
                error_details_pb2.BadRequest(
                    field_violations=[
                        error_details_pb2.BadRequest.FieldViolation(field=name, description=text)
                        for name, text in self.violations.items()
                    ]
                )
            )
        if self.retry_after is not None:
            delay = duration_pb2.Duration()
            delay.FromNanoseconds(round(self.retry_after * 1e9))
            details.append(error_details_pb2.RetryInfo(retry_delay=delay))
        packed = []
        for detail in details:
            packed.append(any_pb2.Any())
            packed[-1].Pack(detail)
        return rpc_status.to_status(
            status_pb2.Status(code=self.code.value[0], message=self.message, details=packed)
        )


class Hang:
    """In the place of an answer: wait until the client gives up."""


Answer = Message | Failure | Hang | Sequence[Message | Failure | Hang] | Callable[[Any], Any]


def state(weights: Mapping[str, float] = DEFAULT, generation: int = GENERATION) -> mix_pb2.MixState:
    return mix_pb2.MixState(
        generation=generation,
        digest=digest_of(weights),
        entries=[
            mix_pb2.BoundEntry(domain=name, weight=weight, adapter_digest=name.encode().hex() * 4)
            for name, weight in sorted(weights.items())
        ],
    )


def digest_of(weights: Mapping[str, float]) -> str:
    return repr(sorted(weights.items())).encode().hex().ljust(64, "0")[:64]


def weights_of(mix: mix_pb2.Mix) -> dict[str, float]:
    return {entry.domain: entry.weight for entry in mix.entries}


def state_for(request: Any) -> mix_pb2.MixState:
    """The mix that a request asks for, or the default one."""
    return state(weights_of(request.mix)) if request.HasField("mix") else state()


def named_mix(name: str, weights: Mapping[str, float]) -> mix_pb2.NamedMix:
    return mix_pb2.NamedMix(
        name=name,
        entries=[mix_pb2.DomainWeight(domain=d, weight=w) for d, w in sorted(weights.items())],
    )


def provenance(request: adapter_pb2.MergeAdaptersRequest) -> adapter_pb2.Provenance:
    return adapter_pb2.Provenance(
        method=request.method, options=request.options, parts=state_for(request).entries
    )


def adapter(domain: str = "math", weight: float = 1.0, **fields: Any) -> adapter_pb2.Adapter:
    return adapter_pb2.Adapter(
        domain=domain,
        digest=domain.encode().hex().ljust(64, "0"),
        source=adapter_pb2.ADAPTER_SOURCE_BUNDLED,
        rank=4,
        parameters=147_456,
        bytes=591_872,
        weight=weight,
        **fields,
    )


def score_response(request: inference_pb2.ScoreRequest) -> inference_pb2.ScoreResponse:
    """One token a character of a text, at a loss of the length of the text in units of 1/1000.

    Under the second of several mixes twice, under the third three times that, and so on.
    """
    states = [state(weights_of(mix)) for mix in request.mixes] or [state_for(request)]
    items = []
    for item in request.items:
        tokens = len(item.text or item.question_answer.answer)
        logprob = -tokens * tokens / 1000
        items.append(inference_pb2.ItemScore(tokens=tokens, logprob=logprob, perplexity=2.0))
    tokens = sum(item.tokens for item in items)
    response = inference_pb2.ScoreResponse(
        items=items, tokens=tokens, perplexity=2.0, mix=states[0]
    )
    for times, each in enumerate(states if request.mixes else [], start=1):
        block = response.mixes.add(items=items, tokens=tokens, perplexity=2.0**times, mix=each)
        for scored in block.items:
            scored.logprob *= times
    return response


def chunks(
    request: inference_pb2.GenerateStreamRequest,
) -> list[inference_pb2.GenerateStreamResponse]:
    return [
        inference_pb2.GenerateStreamResponse(text="The sum", token_ids=[464, 2160]),
        inference_pb2.GenerateStreamResponse(text=" is 5.", token_ids=[318]),
        inference_pb2.GenerateStreamResponse(
            finish_reason=inference_pb2.FINISH_REASON_LENGTH,
            usage=inference_pb2.Usage(prompt_tokens=9, completion_tokens=3),
            mix=state_for(request),
            request_id="r-1",
        ),
    ]


def fit_updates(request: inference_pb2.FitMixRequest) -> list[inference_pb2.FitMixResponse]:
    weights = [
        mix_pb2.DomainWeight(domain=domain, weight=0.25 * place)
        for place, domain in enumerate(request.domains)
    ]
    progress = inference_pb2.FitProgress(evaluations=7, budget=50, weights=weights, loss=2.5)
    fitted = {weight.domain: weight.weight for weight in weights if weight.weight}
    nothing = inference_pb2.Estimate(value=2.5, low=math.nan, high=math.nan)
    return [
        inference_pb2.FitMixResponse(progress=progress),
        inference_pb2.FitMixResponse(
            result=inference_pb2.FitResult(
                weights=weights,
                candidates=[
                    inference_pb2.FitCandidate(
                        mix=state(fitted),
                        fitted_loss=2.125,
                        held_out_loss=nothing,
                        held_out_items=[
                            inference_pb2.ItemScore(tokens=2, logprob=-3),
                            inference_pb2.ItemScore(tokens=4, logprob=-5),
                            inference_pb2.ItemScore(tokens=4, logprob=-6.5),
                        ],
                    ),
                    inference_pb2.FitCandidate(
                        mix=state({}),
                        fitted_loss=3.0,
                        held_out_loss=inference_pb2.Estimate(value=3.25, low=3, high=3.5),
                        excess=inference_pb2.Estimate(value=0.75, low=-0.125, high=1),
                        held_out_items=[inference_pb2.ItemScore(tokens=2, logprob=-4)] * 3,
                    ),
                ],
                fitted_rows=5,
                fitted_tokens=1234,
                held_out_rows=3,
                held_out_tokens=456,
                evaluations=47,
                warnings=["3 different rows are held out"],
                held_out=[0, 3, 4],
            )
        ),
    ]


def default_answers() -> dict[str, Answer]:
    return {
        "Generate": lambda request: inference_pb2.GenerateResponse(
            text="The sum is 5.",
            token_ids=[464, 2160, 318],
            finish_reason=inference_pb2.FINISH_REASON_STOP,
            usage=inference_pb2.Usage(prompt_tokens=9, completion_tokens=3),
            mix=state_for(request),
            logprobs=[-0.25, -1.5, float("-inf")] if request.options.logprobs else [],
            top_logprobs=[
                inference_pb2.TopLogprobs(token_ids=[7, token], logprobs=[-0.125, -0.25])
                for token in [464, 2160, 318]
                if request.options.top_logprobs
            ],
            request_id="r-1",
        ),
        "GenerateStream": chunks,
        "Score": score_response,
        "FitMix": fit_updates,
        "AddDomain": lambda request: mix_pb2.AddDomainResponse(
            mix=state({**DEFAULT, request.domain: request.weight})
        ),
        "RemoveDomain": mix_pb2.RemoveDomainResponse(mix=state({"math": 1.0})),
        "SetMix": lambda request: mix_pb2.SetMixResponse(mix=state_for(request)),
        "GetMix": mix_pb2.GetMixResponse(mix=state(), resident=state({})),
        "WatchMix": [
            mix_pb2.WatchMixResponse(mix=state({}, 7)),
            mix_pb2.WatchMixResponse(mix=state(DEFAULT, 8)),
        ],
        "AnalyzeMix": lambda request: analysis(state_for(request)),
        "VerifyWeights": verification(ok=True),
        "NameMix": lambda request: mix_pb2.NameMixResponse(
            named_mix=named_mix(request.name, weights_of(request.mix) or DEFAULT)
        ),
        "UnnameMix": mix_pb2.UnnameMixResponse(),
        "ListNamedMixes": mix_pb2.ListNamedMixesResponse(
            named_mixes=[named_mix("half", {"math": 0.5}), named_mix("plain", {})]
        ),
        "ListAdapters": adapter_pb2.ListAdaptersResponse(
            adapters=[
                adapter("finance_stock_trading", 0.0),
                adapter("math"),
                adapter("medicine", 0.5),
            ]
        ),
        "GetAdapter": lambda request: adapter_pb2.GetAdapterResponse(
            adapter=adapter(
                request.domain,
                modules=[f"transformer.h.{i}.attn.c_attn" for i in range(4)],
                config_json='{"r":4,"lora_alpha":64,"target_modules":["c_attn"]}',
            )
        ),
        "PushAdapter": lambda request: adapter_pb2.PushAdapterResponse(
            adapter=adapter(request.domain, 0.0), generation=GENERATION
        ),
        "DeleteAdapter": adapter_pb2.DeleteAdapterResponse(),
        "MergeAdapters": lambda request: adapter_pb2.MergeAdaptersResponse(
            adapter=adapter(request.domain, 0.0, provenance=provenance(request)),
            generation=GENERATION,
            seconds=0.125,
            deviation=0.25,
        ),
        "GetServerInfo": server_pb2.GetServerInfoResponse(
            version="0.1.0",
            base="mini",
            base_digest="ab" * 32,
            dtype="float32",
            device="cpu",
            context_length=256,
            limits=server_pb2.Limits(
                max_batch=8,
                max_queue=64,
                max_rank=64,
                max_adapter_bytes=2**28,
                max_domains_in_mix=16,
                max_score_items=256,
                max_score_rows=2048,
            ),
            running=3,
            waiting=1,
            mix=state(),
            adapters=3,
            uptime_seconds=7384.5,
            weights_intact=True,
        ),
        "ListChanges": audit_pb2.ListChangesResponse(
            changes=[
                audit_pb2.Change(
                    time="2030-01-31T12:00:00Z",
                    who=who,
                    peer="ipv4:10.0.0.1:40000",
                    what=what,
                    generation_before=GENERATION - 1,
                    digest_before="ab" * 32,
                    generation=GENERATION,
                    digest="cd" * 32,
                )
                for who, what in (("ops", "set math=1,medicine=0.5"), ("anonymous", "delete law"))
            ]
        ),
        "Check": health_pb2.HealthCheckResponse(status=health_pb2.HealthCheckResponse.SERVING),
    }


def analysis(mix: mix_pb2.MixState) -> mix_pb2.AnalyzeMixResponse:
    return mix_pb2.AnalyzeMixResponse(
        mix=mix,
        domains=[
            mix_pb2.DomainAnalysis(
                domain=entry.domain,
                weight=entry.weight,
                delta_norm=3.25,
                relative_norm=0.0213,
                modules=24,
            )
            for entry in mix.entries
        ],
        pairs=[
            mix_pb2.PairAnalysis(
                first="math",
                second="medicine",
                cosine_rms=0.1234,
                random_floor=0.0013,
                module_types=[
                    mix_pb2.ModuleTypeCosine(
                        module_type=name, cosine_rms=cosine, random_floor=0.0013
                    )
                    for name, cosine in (("attn.c_attn", 0.151), ("mlp.c_proj", 0.09))
                ],
                modules=[mix_pb2.ModuleCosine(module="transformer.h.0.attn.c_attn", cosine=-0.1)],
            )
        ],
        interference_ratio=0.118,
        fold_error=0.00042,
        folded=True,
        warnings=["math and medicine reinforce each other: weights that sum to 1 keep their size"],
        longest_stall_seconds=0.0042,
    )


def verification(*, ok: bool) -> mix_pb2.VerifyWeightsResponse:
    return mix_pb2.VerifyWeightsResponse(
        ok=ok,
        mix=state(),
        base_digest="ab" * 32,
        resident_hash="cd" * 32,
        dtype="float32",
        device="cpu",
        damaged_resident=[] if ok else ["transformer.h.0.attn.c_attn.weight"],
        damaged_base=[] if ok else ["transformer.wte.weight"],
        damaged_adapters=[] if ok else ["ef" * 32],
        longest_stall_seconds=0.0042,
    )


class FakeServer:
    """Runs while its `with` block does; `address` is `listen`'s, or the `socket` in a folder.

    With `credentials` it speaks TLS.
    """

    def __init__(
        self,
        socket: Path | None = None,
        credentials: grpc.ServerCredentials | None = None,
        listen: str = "127.0.0.1:0",
    ) -> None:
        self.answers = default_answers()
        self.requests: list[Any] = []
        self.peers: list[str] = []  # From where they came.
        self.authorizations: list[str | None] = []
        self.arrivals: list[float] = []  # as time.monotonic has it
        self.seconds_left: list[float | None] = []
        self.asked = threading.Event()  # Set at the first request.
        # Set when a stream ends before all its parts were taken.
        self.cancelled = threading.Event()
        self._server = grpc.server(
            futures.ThreadPoolExecutor(max_workers=8),
            options=[("grpc.max_receive_message_length", -1)],
        )
        servicer = cast(Any, _Servicer(self))
        inference_pb2_grpc.add_InferenceServiceServicer_to_server(servicer, self._server)
        mix_pb2_grpc.add_MixServiceServicer_to_server(servicer, self._server)
        adapter_pb2_grpc.add_AdapterServiceServicer_to_server(servicer, self._server)
        server_pb2_grpc.add_ServerServiceServicer_to_server(servicer, self._server)
        audit_pb2_grpc.add_AuditServiceServicer_to_server(servicer, self._server)
        self._health = health.HealthServicer()
        self.serve(True)
        health_pb2_grpc.add_HealthServicer_to_server(
            cast(Any, _HealthServicer(servicer, self._health)), self._server
        )
        address = f"unix:{socket}" if socket else listen
        if credentials is None:
            port = self._server.add_insecure_port(address)
        else:
            port = self._server.add_secure_port(address, credentials)
        self.address = f"unix:{socket}" if socket else f"{listen.rpartition(':')[0]}:{port}"

    def serve(self, serving: bool) -> None:
        """Tell those who watch whether texts are served."""
        status = health_pb2.HealthCheckResponse
        self._health.set(
            "superpose.v1.InferenceService", status.SERVING if serving else status.NOT_SERVING
        )

    @property
    def request(self) -> Any:
        """The only request so far."""
        (request,) = self.requests
        return request

    def __enter__(self) -> Self:
        self._server.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._server.stop(grace=None).wait()

    def respond(self, method: str, request: Any, context: grpc.ServicerContext) -> Iterator[Any]:
        self.arrivals.append(time.monotonic())
        self.requests.append(request)
        self.peers.append(context.peer())
        self.asked.set()
        metadata = dict(context.invocation_metadata())
        self.authorizations.append(cast("str | None", metadata.get("authorization")))
        # gRPC counts from the far future where the client set no deadline.
        left = context.time_remaining()
        self.seconds_left.append(None if left is None or left > 1e6 else left)
        ended, complete = threading.Event(), threading.Event()

        def end() -> None:
            ended.set()
            if not complete.is_set():
                self.cancelled.set()

        if not context.add_callback(end):
            end()
        answer = self.answers[method]
        if callable(answer):
            answer = answer(request)
        parts = answer if isinstance(answer, list) else [answer]
        for part in parts:
            if isinstance(part, Failure):
                context.abort_with_status(part.status())
            elif isinstance(part, Hang):
                ended.wait(20)
                return
            else:
                yield part
        complete.set()


class _Servicer:
    """Has every method of every service."""

    def __init__(self, fake: FakeServer) -> None:
        self._fake = fake

    def __getattr__(self, method: str) -> Callable[[Any, grpc.ServicerContext], Any]:
        def stream(request: Any, context: grpc.ServicerContext) -> Iterator[Any]:
            return self._fake.respond(method, request, context)

        def unary(request: Any, context: grpc.ServicerContext) -> Any:
            parts = stream(request, context)
            answer = next(parts, None)
            next(parts, None)
            return answer

        return stream if method in STREAMS else unary


class _HealthServicer:
    """Answers as the fake does, and is watched as gRPC's own."""

    def __init__(self, answers: Any, watched: health.HealthServicer) -> None:
        self.Check = answers.Check
        self.Watch = watched.Watch

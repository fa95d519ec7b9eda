"""Between the wire and the server's own types."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from typing import Any, TypeVar

from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import Message

from superpose_adapters.merge.methods import METHODS, MethodError, read_method
from superpose_adapters.mix import BoundMix, Mix
from superpose_adapters.provenance import Provenance
from superpose_adapters.scoring import Loss, Scope
from superpose_proto.v1 import adapter_pb2, inference_pb2, mix_pb2
from superpose_server.control.default_mix import MixState
from superpose_server.control.named_mixes import NamedMix
from superpose_server.control.registry import Registered, Source
from superpose_server.door.contract.options import options_from_wire, options_to_wire
from superpose_server.engine.sampling import SamplingParams
from superpose_server.engine.sequence import Chunk, FinishReason
from superpose_server.errors import InvalidArgument
from superpose_server.inference.request import (
    Chat,
    FitRequest,
    GenerateRequest,
    MergeRequest,
    Prompt,
    QuestionAnswer,
    ScoreItem,
    ScoreRequest,
)
from superpose_server.inference.result import Estimate, FitProgress, FitResult, Scores

FINISH_REASONS = {
    None: inference_pb2.FINISH_REASON_UNSPECIFIED,
    FinishReason.STOP: inference_pb2.FINISH_REASON_STOP,
    FinishReason.LENGTH: inference_pb2.FINISH_REASON_LENGTH,
    FinishReason.ABORTED: inference_pb2.FINISH_REASON_ABORTED,
}
_SCOPES: dict[int, Scope] = {
    inference_pb2.SCORE_SCOPE_UNSPECIFIED: "all",
    inference_pb2.SCORE_SCOPE_ALL: "all",
    inference_pb2.SCORE_SCOPE_ANSWER: "answer",
}
_SOURCES = {
    Source.BUNDLED: adapter_pb2.ADAPTER_SOURCE_BUNDLED,
    Source.DIRECTORY: adapter_pb2.ADAPTER_SOURCE_DIRECTORY,
    Source.PUSHED: adapter_pb2.ADAPTER_SOURCE_PUSHED,
}

_MixedRequest = (
    adapter_pb2.MergeAdaptersRequest
    | inference_pb2.GenerateRequest
    | inference_pb2.GenerateStreamRequest
    | inference_pb2.ScoreRequest
    | mix_pb2.AnalyzeMixRequest
    | mix_pb2.NameMixRequest
)
_Scores = TypeVar("_Scores", inference_pb2.ScoreResponse, inference_pb2.MixScore)


def mix_from_wire(message: mix_pb2.Mix, field: str = "mix") -> Mix:
    """Return the mix that a client asks for in `field`.

    Raises:
        InvalidArgument: A bad name or weight, or a domain named twice.
    """
    try:
        return Mix.of((entry.domain, entry.weight) for entry in message.entries)
    except ValueError as error:
        raise InvalidArgument(str(error), "INVALID_MIX", field=field) from error


def requested_mix(request: _MixedRequest) -> Mix | None:
    """Return the mix that a request names; None if it is absent, which means the default mix.

    Raises:
        InvalidArgument: See `mix_from_wire`.
    """
    return mix_from_wire(request.mix) if request.HasField("mix") else None


def mix_to_wire(state: MixState) -> mix_pb2.MixState:
    """Return a bound mix for a response, entries in ascending order of domain."""
    return mix_pb2.MixState(
        generation=state.generation,
        digest=state.mix.digest,
        entries=[
            mix_pb2.BoundEntry(
                domain=entry.domain, weight=entry.weight, adapter_digest=entry.adapter.digest
            )
            for entry in sorted(state.mix.entries, key=lambda entry: entry.domain)
        ],
    )


def named_mix_to_wire(named: NamedMix) -> mix_pb2.NamedMix:
    """Return a named mix for a response."""
    return mix_pb2.NamedMix(
        name=named.name,
        entries=[
            mix_pb2.DomainWeight(domain=domain, weight=weight)
            for domain, weight in named.mix.entries
        ],
    )


def params_from_wire(options: Message) -> SamplingParams:
    """Return sampling parameters: every field that is set, under its own name.

    A field of `GenerateOptions` is a field of `SamplingParams`; what is absent takes its default.

    Raises:
        InvalidArgument: A value out of its range.
        TypeError: An option that the sampler does not have.
    """
    given: dict[str, Any] = {
        field.name: _plain(field, value) for field, value in options.ListFields()
    }
    try:
        return SamplingParams(**given)
    except InvalidArgument as error:
        # On the wire the fields are those of a message within the request.
        raise InvalidArgument(
            error.message, error.reason, field=f"options.{error.field}"
        ) from error


def _plain(field: FieldDescriptor, value: Any) -> Any:
    if field.message_type is not None and field.message_type.GetOptions().map_entry:
        return dict(value)
    return tuple(value) if field.is_repeated else value


def generate_from_wire(
    request: inference_pb2.GenerateRequest | inference_pb2.GenerateStreamRequest,
) -> GenerateRequest:
    """Return what a client asks to generate; without any input its prompt is the empty text.

    Raises:
        InvalidArgument: An option or a mix that means nothing.
    """
    prompt: Prompt = request.prompt
    if request.HasField("token_ids"):
        prompt = request.token_ids.ids
    elif request.HasField("chat"):
        prompt = Chat(tuple((turn.role, turn.content) for turn in request.chat.messages))
    options = params_from_wire(request.options)
    return GenerateRequest(
        prompt, requested_mix(request), options, request.request_id, request.min_generation
    )


def score_from_wire(request: inference_pb2.ScoreRequest) -> ScoreRequest:
    """Return what a client asks to score; an item of no kind is the empty text.

    Raises:
        InvalidArgument: A scope that does not exist, or a mix that means nothing.
    """
    scope = _scope_from_wire(request.scope)
    max_length = request.max_length if request.HasField("max_length") else None
    items = tuple(_item_from_wire(item) for item in request.items)
    if request.mixes and request.HasField("mix"):
        raise InvalidArgument(
            "mix and mixes are both given: send one of them", "MIX_GIVEN_TWICE", field="mixes"
        )
    mixes = tuple(
        mix_from_wire(mix, f"mixes[{index}]") for index, mix in enumerate(request.mixes)
    ) or (requested_mix(request),)
    return ScoreRequest(items, mixes, max_length, scope, min_generation=request.min_generation)


def _scope_from_wire(number: int) -> Scope:
    scope = _SCOPES.get(number)
    if scope is None:
        raise InvalidArgument(f"scope is {number}: use ALL or ANSWER", "BAD_SCOPE", field="scope")
    return scope


def fit_from_wire(request: inference_pb2.FitMixRequest) -> FitRequest:
    """Return what a client asks to fit; an absent field takes its default.

    Raises:
        InvalidArgument: A value out of its range.
    """
    given: dict[str, Any] = {
        name: getattr(request, name)
        for name in ("max_length", "budget", "low", "high", "penalty")
        if request.HasField(name)
    }
    return FitRequest(
        tuple(_item_from_wire(item) for item in request.items),
        tuple(request.domains),
        scope=_scope_from_wire(request.scope),
        seed=request.seed,
        sources=tuple(request.sources),
        **given,
    )


def fit_to_wire(
    update: FitProgress | FitResult, domains: Sequence[str]
) -> inference_pb2.FitMixResponse:
    """Return an update of a fit of the weights of `domains`."""
    weights = [
        mix_pb2.DomainWeight(domain=domain, weight=weight)
        for domain, weight in zip(domains, update.weights, strict=True)
    ]
    if isinstance(update, FitProgress):
        return inference_pb2.FitMixResponse(
            progress=inference_pb2.FitProgress(
                evaluations=update.evaluations,
                budget=update.budget,
                weights=weights,
                loss=update.loss,
            )
        )
    return inference_pb2.FitMixResponse(
        result=inference_pb2.FitResult(
            weights=weights,
            candidates=[
                inference_pb2.FitCandidate(
                    mix=mix_to_wire(candidate.mix),
                    fitted_loss=candidate.fitted_loss,
                    held_out_loss=_estimate_to_wire(candidate.held_out_loss),
                    excess=_estimate_to_wire(candidate.excess),
                    held_out_items=map(_item_to_wire, candidate.held_out_items),
                )
                for candidate in update.candidates
            ],
            fitted_rows=update.fitted_rows,
            fitted_tokens=update.fitted_tokens,
            held_out_rows=len(update.held_out),
            held_out=update.held_out,
            held_out_tokens=update.held_out_tokens,
            evaluations=update.evaluations,
            warnings=update.warnings,
        )
    )


def _estimate_to_wire(estimate: Estimate) -> inference_pb2.Estimate:
    return inference_pb2.Estimate(value=estimate.value, low=estimate.low, high=estimate.high)


def _item_from_wire(item: inference_pb2.ScoreItem) -> ScoreItem:
    if item.HasField("question_answer"):
        return QuestionAnswer(item.question_answer.question, item.question_answer.answer)
    if item.HasField("token_ids"):
        return item.token_ids.ids  # As it is: it may hold millions, most of them to be refused.
    return item.text


def scores_to_wire(
    scores: Sequence[Scores], *, logprobs: bool, several: bool = False
) -> inference_pb2.ScoreResponse:
    """Return scores for a response, those of single tokens only if they are asked for.

    `several` is whether the request has `mixes`, and so wants a block for each.
    """
    first = _scores_to_wire(inference_pb2.ScoreResponse, scores[0], logprobs)
    if several:
        first.mixes.extend(
            _scores_to_wire(inference_pb2.MixScore, each, logprobs) for each in scores
        )
    return first


def _scores_to_wire(kind: type[_Scores], scores: Scores, logprobs: bool) -> _Scores:
    loss = scores.loss
    return kind(
        items=[
            _item_to_wire(item.loss, item.logprobs if logprobs else ()) for item in scores.items
        ],
        tokens=loss.tokens,
        perplexity=_perplexity(loss),
        mix=mix_to_wire(scores.mix),
    )


def _item_to_wire(loss: Loss, logprobs: Sequence[float] = ()) -> inference_pb2.ItemScore:
    return inference_pb2.ItemScore(
        tokens=loss.tokens, logprob=-loss.nats, perplexity=_perplexity(loss), logprobs=logprobs
    )


def _perplexity(loss: Loss) -> float:
    return loss.perplexity if loss.tokens else math.nan


def top_logprobs_to_wire(chunk: Chunk) -> list[inference_pb2.TopLogprobs]:
    """Return the likeliest tokens in the place of each new token."""
    return [
        inference_pb2.TopLogprobs(token_ids=top.token_ids, logprobs=top.logprobs)
        for top in chunk.top_logprobs
    ]


def adapter_to_wire(
    registered: Registered, default: BoundMix, *, whole: bool
) -> adapter_pb2.Adapter:
    """Return an adapter for a response; with `whole` its modules, config and warnings too."""
    adapter = registered.adapter
    held = {e.domain: e.weight for e in default.entries if e.adapter == adapter}
    message = adapter_pb2.Adapter(
        domain=registered.domain,
        digest=adapter.digest,
        source=_SOURCES[registered.source],
        rank=adapter.rank,
        parameters=adapter.parameters,
        bytes=adapter.nbytes,
        weight=held.get(registered.domain, 0.0),
        provenance=_provenance_to_wire(adapter.provenance),
    )
    if whole:
        message.modules.extend(adapter.modules)
        message.config_json = json.dumps(dict(adapter.config), sort_keys=True)
        message.warnings.extend(adapter.warnings)
    return message


def _provenance_to_wire(provenance: Provenance | None) -> adapter_pb2.Provenance | None:
    if provenance is None:
        return None
    return adapter_pb2.Provenance(
        method=provenance.method,
        options=options_to_wire(provenance.options),
        parts=[
            mix_pb2.BoundEntry(domain=each.domain, weight=each.weight, adapter_digest=each.digest)
            for each in provenance.sources
        ],
    )


def merge_from_wire(request: adapter_pb2.MergeAdaptersRequest) -> MergeRequest:
    """Return what a client asks to merge.

    Raises:
        InvalidArgument: A mix that means nothing, or a method or an option that there is not.
    """
    field = "options" if request.method in METHODS else "method"
    try:
        method = read_method(request.method, options_from_wire(request.options))
    except MethodError as error:
        raise InvalidArgument(str(error), "INVALID_METHOD", field=field) from error
    return MergeRequest(request.domain, requested_mix(request), method, request.replace)

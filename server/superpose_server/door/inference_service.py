"""InferenceService: requests in, chunks and scores out."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import AsyncIterator
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass
from typing import Any

from superpose_adapters.mix import BoundMix
from superpose_adapters.scoring import EncodedText, Loss, Scope, encode_qa, encode_text
from superpose_proto.v1 import inference_pb2 as pb
from superpose_proto.v1 import inference_pb2_grpc, mix_pb2
from superpose_server.door.convert import (
    FINISH_REASONS,
    mix_from_wire,
    mix_to_wire,
    params_from_wire,
)
from superpose_server.door.delivery import Delivery, Inbox
from superpose_server.engine.sampling import SamplingParams
from superpose_server.engine.score import ScoreRow
from superpose_server.engine.sequence import Chunk, Sequence
from superpose_server.errors import DataLoss, InvalidArgument, ShuttingDown
from superpose_server.runtime import Runtime

_SCOPES: dict[int, Scope] = {
    pb.SCORE_SCOPE_UNSPECIFIED: "all",
    pb.SCORE_SCOPE_ALL: "all",
    pb.SCORE_SCOPE_ANSWER: "answer",
}
# Characters of one text: far above any context, far below what would hold the server up.
_MAX_TEXT = 1 << 20
# It is in every chunk of a stream.
_MAX_REQUEST_ID = 256
# From this many characters on, a text is tokenised beside the event loop.
_LONG_TEXT = 1 << 14

GenerateRequest = pb.GenerateRequest | pb.GenerateStreamRequest


@dataclass(frozen=True)
class _Accepted:
    """A checked request, its mix bound at this moment."""

    prompt: list[int]
    params: SamplingParams
    mix: BoundMix
    state: mix_pb2.MixState
    request_id: str

    def usage(self, completion_tokens: int) -> pb.Usage:
        return pb.Usage(prompt_tokens=len(self.prompt), completion_tokens=completion_tokens)


class InferenceService(inference_pb2_grpc.InferenceServiceServicer):
    """Binds requests to mixes and runs them on the engine."""

    def __init__(self, runtime: Runtime) -> None:
        """Serve from `runtime`."""
        self._runtime = runtime
        self._delivery = Delivery(asyncio.get_running_loop())

    async def Generate(self, request: pb.GenerateRequest, context: Any) -> pb.GenerateResponse:
        """Return the whole text."""
        accepted = await self._accept(request)
        chunk = await self._submit(accepted, context, whole=True).take()
        if chunk.error is not None:
            raise chunk.error
        return pb.GenerateResponse(
            text=chunk.text,
            token_ids=chunk.token_ids,
            logprobs=chunk.logprobs,
            finish_reason=_finish_reason(chunk),
            usage=accepted.usage(len(chunk.token_ids)),
            mix=accepted.state,
            request_id=accepted.request_id,
        )

    async def GenerateStream(
        self, request: pb.GenerateStreamRequest, context: Any
    ) -> AsyncIterator[pb.GenerateStreamResponse]:
        """Send text as it is made."""
        accepted = await self._accept(request)
        inbox = self._submit(accepted, context)
        count = 0
        chunk = Chunk()
        while not chunk.last:
            chunk = await inbox.take()
            if chunk.error is None or chunk.token_ids:
                response = pb.GenerateStreamResponse(
                    text=chunk.text,
                    token_ids=chunk.token_ids,
                    logprobs=chunk.logprobs,
                    request_id=accepted.request_id,
                )
                first = count == 0
                count += len(chunk.token_ids)
                if first or chunk.last:
                    response.mix.CopyFrom(accepted.state)
                if chunk.finish_reason is not None:
                    response.finish_reason = _finish_reason(chunk)
                    response.usage.CopyFrom(accepted.usage(count))
                yield response
        if chunk.error is not None:
            raise chunk.error

    async def Score(self, request: pb.ScoreRequest, context: Any) -> pb.ScoreResponse:
        """Return log-probabilities and perplexities of given texts."""
        encoded, scope = await asyncio.to_thread(self._encode_items, request)
        bound, state = self._bind(request)
        rows = [ScoreRow(text.ids, text.first_scored(scope)) for text in encoded]
        result = await asyncio.wrap_future(self._runtime.engine.score(rows, bound))
        total = Loss()
        items = []
        for logprobs in result.value:
            loss = Loss(-sum(logprobs), len(logprobs))
            total += loss
            items.append(
                pb.ItemScore(
                    tokens=loss.tokens,
                    logprob=-loss.nats,
                    perplexity=loss.perplexity if loss.tokens else 0.0,
                    logprobs=logprobs if request.logprobs else (),
                )
            )
        return pb.ScoreResponse(
            items=items, tokens=total.tokens, perplexity=total.perplexity, mix=state
        )

    def _bind(
        self, request: GenerateRequest | pb.ScoreRequest
    ) -> tuple[BoundMix, mix_pb2.MixState]:
        """Resolve the request's mix now; what changes later does not concern it."""
        runtime = self._runtime
        if runtime.ending.is_set():
            raise ShuttingDown
        if not runtime.weights_intact:
            raise DataLoss(
                "the weights failed their last verification: set another mix and verify again, "
                "or restart the server",
                "WEIGHTS_DAMAGED",
            )
        state = runtime.default_mix.state
        bound = state.mix
        if request.HasField("mix"):
            bound = runtime.registry.bind(mix_from_wire(request.mix))
        return bound, mix_to_wire(state.generation, bound)

    async def _accept(self, request: GenerateRequest) -> _Accepted:
        if len(request.request_id) > _MAX_REQUEST_ID:
            raise InvalidArgument(
                f"request_id has {len(request.request_id)} characters: send at most "
                f"{_MAX_REQUEST_ID}",
                "REQUEST_ID_TOO_LONG",
                field="request_id",
            )
        params = params_from_wire(request.options)
        if len(request.prompt) < _LONG_TEXT and not request.HasField("chat"):
            prompt = self._encode_prompt(request)
        else:
            prompt = await asyncio.to_thread(self._encode_prompt, request)
        context = self._runtime.model.context_length
        if len(prompt) >= context:
            raise InvalidArgument(
                f"the prompt has {len(prompt)} tokens but the context holds {context}, "
                "answer included: shorten the prompt",
                "PROMPT_TOO_LONG",
                field="prompt",
            )
        if len(prompt) + params.max_new_tokens > context:
            raise InvalidArgument(
                f"max_new_tokens is {params.max_new_tokens}: with a prompt of {len(prompt)} tokens "
                f"the context of {context} leaves {context - len(prompt)}",
                "MAX_NEW_TOKENS_TOO_LARGE",
                field="options.max_new_tokens",
            )
        self._check_ids(params.stop_token_ids, "options.stop_token_ids")
        bound, state = self._bind(request)
        return _Accepted(prompt, params, bound, state, request.request_id or str(uuid.uuid4()))

    def _encode_prompt(self, request: GenerateRequest) -> list[int]:
        tokenizer = self._runtime.tokenizer
        kind = request.WhichOneof("input")
        if kind == "token_ids":
            ids = list(request.token_ids.ids)
            self._check_ids(ids, "token_ids")
        elif kind == "chat":
            turns = [(message.role, message.content) for message in request.chat.messages]
            _check_size(sum(len(content) for _, content in turns), "chat")
            ids = tokenizer.encode_chat(turns)
        else:
            _check_size(len(request.prompt), "prompt")
            ids = tokenizer.encode(request.prompt) if request.prompt else []
        if not ids:
            raise InvalidArgument(
                "the prompt is empty: send at least one token", "PROMPT_EMPTY", field="prompt"
            )
        return ids

    def _check_ids(self, ids: SequenceOf[int], field: str) -> None:
        size = self._runtime.model.vocabulary
        for token in ids:
            if token >= size:
                raise InvalidArgument(
                    f"{field} holds {token}: the vocabulary has {size} tokens, counted from 0",
                    "TOKEN_OUT_OF_RANGE",
                    field=field,
                )

    def _submit(self, accepted: _Accepted, context: Any, *, whole: bool = False) -> Inbox:
        """Give a row to the engine, and return where its chunks arrive."""
        inbox = self._delivery.inbox(whole=whole)
        sequence = Sequence(
            accepted.prompt, accepted.mix, accepted.params, inbox.put, self._runtime.tokenizer
        )
        self._runtime.engine.submit(sequence)

        def leave(_: object) -> None:
            # The client is gone or its deadline is over, even in the midst of a response that it
            # does not read; or the row has ended, and this says nothing new.
            sequence.cancelled = True

        context.add_done_callback(leave)
        return inbox

    def _encode_items(self, request: pb.ScoreRequest) -> tuple[list[EncodedText], Scope]:
        limit = self._runtime.limits.max_score_items
        if not 1 <= len(request.items) <= limit:
            raise InvalidArgument(
                f"items has {len(request.items)} texts: send 1 to {limit}",
                "BAD_ITEM_COUNT",
                field="items",
            )
        context = self._runtime.model.context_length
        length = request.max_length if request.HasField("max_length") else context
        if not 2 <= length <= context:
            raise InvalidArgument(
                f"max_length is {length}: use 2 to {context}", "BAD_MAX_LENGTH", field="max_length"
            )
        scope = _SCOPES.get(request.scope)
        if scope is None:
            raise InvalidArgument(
                f"scope is {request.scope}: use ALL or ANSWER", "BAD_SCOPE", field="scope"
            )
        encoded = []
        for index, item in enumerate(request.items):
            field = f"items[{index}]"
            text = self._encode_item(item, field, length)
            if scope == "answer" and text.answer_start is None:
                raise InvalidArgument(
                    f"{field} has no answer: scope ANSWER takes question_answer items",
                    "BAD_SCOPE",
                    field=field,
                )
            encoded.append(text)
        if not any(len(text.ids) > text.first_scored(scope) for text in encoded):
            raise InvalidArgument(
                "nothing to score: no item has a scored token within max_length",
                "NOTHING_TO_SCORE",
                field="items",
            )
        return encoded, scope

    def _encode_item(self, item: pb.ScoreItem, field: str, length: int) -> EncodedText:
        tokenizer = self._runtime.tokenizer.inner
        kind = item.WhichOneof("item")
        if kind == "question_answer":
            row = item.question_answer
            _check_size(len(row.question) + len(row.answer), field)
            return encode_qa(tokenizer, row.question, row.answer, length)
        if kind == "token_ids":
            self._check_ids(item.token_ids.ids, field)
            text = EncodedText(tuple(item.token_ids.ids[:length]))
        else:
            _check_size(len(item.text), field)
            text = encode_text(tokenizer, item.text, length)
        if not text.ids:
            raise InvalidArgument(
                f"{field} is empty: send a text, a question and answer, or token ids",
                "ITEM_EMPTY",
                field=field,
            )
        return text


def _check_size(characters: int, field: str) -> None:
    if characters > _MAX_TEXT:
        raise InvalidArgument(
            f"{field} has {characters} characters: send at most {_MAX_TEXT}",
            "TEXT_TOO_LONG",
            field=field,
        )


def _finish_reason(chunk: Chunk) -> pb.FinishReason.ValueType:
    if chunk.finish_reason is None:
        return pb.FINISH_REASON_UNSPECIFIED
    return FINISH_REASONS[chunk.finish_reason]

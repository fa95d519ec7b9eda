"""InferenceService: requests in, chunks and scores out."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import aclosing
from typing import Any

from superpose_proto.v1 import inference_pb2 as pb
from superpose_proto.v1 import inference_pb2_grpc
from superpose_server.door.contract.convert import (
    FINISH_REASONS,
    fit_from_wire,
    fit_to_wire,
    generate_from_wire,
    mix_to_wire,
    score_from_wire,
    scores_to_wire,
    top_logprobs_to_wire,
)
from superpose_server.inference.generation import Generation
from superpose_server.inference.inference import Inference


class InferenceService(inference_pb2_grpc.InferenceServiceServicer):
    """Text and scores from the inference layer."""

    def __init__(self, inference: Inference) -> None:
        """Serve from `inference`."""
        self._inference = inference

    async def Generate(self, request: pb.GenerateRequest, context: Any) -> pb.GenerateResponse:
        """Return the whole text."""
        generation = await self._generate(request, context)
        chunk = await generation.whole()
        return pb.GenerateResponse(
            text=chunk.text,
            token_ids=chunk.token_ids,
            logprobs=chunk.logprobs,
            top_logprobs=top_logprobs_to_wire(chunk),
            finish_reason=FINISH_REASONS[chunk.finish_reason],
            usage=_usage(generation),
            mix=mix_to_wire(generation.mix),
            request_id=generation.request_id,
        )

    async def GenerateStream(
        self, request: pb.GenerateStreamRequest, context: Any
    ) -> AsyncIterator[pb.GenerateStreamResponse]:
        """Send text as it is made."""
        generation = await self._generate(request, context)
        mix = mix_to_wire(generation.mix)
        first = True
        async for chunk in generation:
            yield pb.GenerateStreamResponse(
                text=chunk.text,
                token_ids=chunk.token_ids,
                logprobs=chunk.logprobs,
                top_logprobs=top_logprobs_to_wire(chunk),
                finish_reason=FINISH_REASONS[chunk.finish_reason],
                usage=None if chunk.finish_reason is None else _usage(generation),
                mix=mix if first or chunk.last else None,
                request_id=generation.request_id,
            )
            first = False

    async def _generate(
        self, request: pb.GenerateRequest | pb.GenerateStreamRequest, context: Any
    ) -> Generation:
        generation = await self._inference.generate(generate_from_wire(request))
        # The client may go away, or its deadline pass, in the midst of a response that it does not
        # read, where nothing else would tell.
        context.add_done_callback(lambda _: generation.cancel())
        return generation

    async def Score(self, request: pb.ScoreRequest, context: Any) -> pb.ScoreResponse:
        """Return log-probabilities and perplexities of given texts."""
        # Beside the event loop, since a request may hold millions of token ids.
        scores = await self._inference.score(await asyncio.to_thread(score_from_wire, request))
        return scores_to_wire(scores, logprobs=request.logprobs, several=bool(request.mixes))

    async def FitMix(
        self, request: pb.FitMixRequest, context: Any
    ) -> AsyncIterator[pb.FitMixResponse]:
        """Send how far the search is, and then what it has found."""
        asked = await asyncio.to_thread(fit_from_wire, request)
        async with aclosing(self._inference.fit(asked)) as updates:
            async for update in updates:
                yield fit_to_wire(update, asked.domains)


def _usage(generation: Generation) -> pb.Usage:
    return pb.Usage(
        prompt_tokens=generation.prompt_tokens, completion_tokens=generation.completion_tokens
    )

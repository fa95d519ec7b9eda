"""`/v1/score`: log-probabilities and perplexities of given texts, as gRPC's `Score`."""

from __future__ import annotations

from starlette.requests import Request
from starlette.responses import Response

from superpose_proto.v1.inference_pb2 import ScoreResponse
from superpose_server.door.contract.convert import scores_to_wire
from superpose_server.door.http.connection import while_connected
from superpose_server.door.http.endpoint import Endpoint
from superpose_server.door.http.fields import FLAG, Asked, Field, Form
from superpose_server.door.http.items import ITEMS, MAX_LENGTH, SCOPE, requested_items
from superpose_server.door.http.json_text import json_answer
from superpose_server.door.http.message import plain, schema
from superpose_server.door.http.mix import MIN_GENERATION, MIX, MIXES, MODEL, requested_mixes
from superpose_server.door.http.texts import mix_headers
from superpose_server.inference.inference import Inference
from superpose_server.inference.request import ScoreRequest

FORM = Form(
    "ScoreRequest",
    (
        MODEL,
        MIX,
        MIXES,
        MIN_GENERATION,
        ITEMS,
        MAX_LENGTH,
        SCOPE,
        Field("logprobs", FLAG, "Send the log-probability of every scored token."),
    ),
)


class ScoreTexts:
    """Scores from the inference layer."""

    def __init__(self, inference: Inference) -> None:
        """Serve from `inference`."""
        self._inference = inference

    def endpoints(self) -> tuple[Endpoint, ...]:
        """Return what is served."""
        return (
            Endpoint(
                "POST",
                "/v1/score",
                self.score,
                "Score given texts.",
                form=FORM,
                reply=schema(ScoreResponse.DESCRIPTOR),
            ),
        )

    async def score(self, request: Request, asked: Asked) -> Response:
        """Answer with a score an item, and that of all of them, under each mix.

        Raises:
            ClientDisconnect: Nobody waits for it any more.
            ServerError: The request is wrong, or cannot be run.
        """
        wanted = ScoreRequest(
            requested_items(asked),
            requested_mixes(asked),
            asked.get("max_length"),
            asked.get("scope", "all"),
            min_generation=asked.get("min_generation", 0),
        )
        scores = await while_connected(request.receive, self._inference.score(wanted))
        message = scores_to_wire(
            scores, logprobs=asked.get("logprobs", False), several="mixes" in asked
        )
        return json_answer(plain(message), headers=mix_headers(scores[0].mix))

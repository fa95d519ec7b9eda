"""`/v1/score`: log-probabilities and perplexities of given texts, as gRPC's `Score`."""

from __future__ import annotations

from typing import get_args

from starlette.requests import Request
from starlette.responses import Response

from superpose_adapters.scoring import Scope
from superpose_proto.v1.inference_pb2 import ScoreResponse
from superpose_server.door.contract.convert import scores_to_wire
from superpose_server.door.http.connection import while_connected
from superpose_server.door.http.endpoint import Endpoint
from superpose_server.door.http.fields import (
    COUNT,
    FLAG,
    TEXT,
    TOKEN_IDS,
    Asked,
    Field,
    Form,
    ListOf,
    OneOf,
)
from superpose_server.door.http.json_text import json_answer
from superpose_server.door.http.message import plain, schema
from superpose_server.door.http.mix import MIX, MODEL, requested_mix
from superpose_server.door.http.texts import mix_headers
from superpose_server.errors import InvalidArgument
from superpose_server.inference.inference import Inference
from superpose_server.inference.request import QuestionAnswer, ScoreItem, ScoreRequest

_ITEM = Form(
    "ScoreItem",
    (
        Field("text", TEXT, "Scored as the base's tokenizer makes it."),
        Field(
            "question_answer",
            Form(
                "QuestionAnswer",
                (Field("question", TEXT, required=True), Field("answer", TEXT, required=True)),
            ),
            "Scored in the template of question-answer rows.",
        ),
        Field("token_ids", TOKEN_IDS, "Scored as they are."),
    ),
)
FORM = Form(
    "ScoreRequest",
    (
        MODEL,
        MIX,
        Field("items", ListOf(_ITEM), "Each of one kind.", required=True),
        Field("max_length", COUNT, "Tokens kept of each item; the context length if absent."),
        Field("scope", OneOf(get_args(Scope)), "all tokens but the first, or those of the answer."),
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
        """Answer with a score an item, and that of all of them.

        Raises:
            ClientDisconnect: Nobody waits for it any more.
            ServerError: The request is wrong, or cannot be run.
        """
        wanted = ScoreRequest(
            tuple(_item(item, f"items[{index}]") for index, item in enumerate(asked["items"])),
            (requested_mix(asked),),
            asked.get("max_length"),
            asked.get("scope", "all"),
        )
        scores = await while_connected(request.receive, self._inference.score(wanted))
        message = scores_to_wire(scores, logprobs=asked.get("logprobs", False))
        return json_answer(plain(message), headers=mix_headers(scores[0].mix))


def _item(item: Asked, at: str) -> ScoreItem:
    if len(item) != 1:
        raise InvalidArgument(
            f"{at} holds {' and '.join(item) or 'nothing'}: send one of text, question_answer and "
            "token_ids",
            "INVALID_FIELD",
            field=at,
        )
    ((kind, value),) = item.items()
    if kind == "question_answer":
        return QuestionAnswer(value["question"], value["answer"])
    found: ScoreItem = value
    return found

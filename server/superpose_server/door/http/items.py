"""What is scored, or fitted on: texts, rows of question-answer data, token ids."""

from __future__ import annotations

from typing import get_args

from superpose_adapters.scoring import Scope
from superpose_server.door.http.fields import (
    COUNT,
    TEXT,
    TOKEN_IDS,
    Asked,
    Field,
    Form,
    ListOf,
    OneOf,
)
from superpose_server.errors import InvalidArgument
from superpose_server.inference.request import QuestionAnswer, ScoreItem

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
ITEMS = Field("items", ListOf(_ITEM), "Each of one kind.", required=True)

MAX_LENGTH = Field("max_length", COUNT, "Tokens kept of each item; the context length if absent.")
SCOPE = Field("scope", OneOf(get_args(Scope)), "all tokens but the first, or those of the answer.")


def requested_items(asked: Asked) -> tuple[ScoreItem, ...]:
    """Return what a body holds to be scored.

    Raises:
        InvalidArgument: An item is of no kind, or of several.
    """
    return tuple(_item(item, f"items[{index}]") for index, item in enumerate(asked["items"]))


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

"""What a door asks for, in plain types.

`field` of an `InvalidArgument` is a path within these; a prompt goes by what it is: `prompt`,
`token_ids` or `chat`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from superpose_adapters.mix import Mix
from superpose_adapters.scoring import Scope
from superpose_server.engine.sampling import SamplingParams

TokenIds = Sequence[int]


@dataclass(frozen=True)
class Chat:
    """A conversation of (role, content), for bases that have a chat template."""

    turns: tuple[tuple[str, str], ...]


Prompt = str | TokenIds | Chat


@dataclass(frozen=True)
class GenerateRequest:
    """A text to go on with.

    Attributes:
        prompt: Text, token ids or a conversation.
        mix: None: the default mix; empty: the base model. It may hold named mixes.
        options: What to generate, and how.
        request_id: Comes back with the answer; made by the server if empty.
    """

    prompt: Prompt
    mix: Mix | None = None
    options: SamplingParams = field(default_factory=SamplingParams)
    request_id: str = ""


@dataclass(frozen=True)
class QuestionAnswer:
    """A row of question-answer data, scored in its template with the end-of-text token behind."""

    question: str
    answer: str


ScoreItem = str | TokenIds | QuestionAnswer


@dataclass(frozen=True)
class ScoreRequest:
    """Texts to score.

    Attributes:
        items: Texts, token ids as they are, or rows of question-answer data.
        mixes: Each item is scored under each of these: None: the default mix; empty: the base
            model. They may hold named mixes.
        max_length: Tokens kept of each item, cut on the right; None: the context length.
        scope: Which tokens count; "answer" is for question-answer rows alone.
        top_logprobs: How many of the likeliest tokens are wanted in the place of each of them.
    """

    items: tuple[ScoreItem, ...]
    mixes: tuple[Mix | None, ...] = (None,)
    max_length: int | None = None
    scope: Scope = "all"
    top_logprobs: int = 0

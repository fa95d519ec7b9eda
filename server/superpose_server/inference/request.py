"""What a door asks for, in plain types.

`field` of an `InvalidArgument` is a path within these; a prompt goes by what it is: `prompt`,
`token_ids` or `chat`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from superpose_adapters.merge.method import Method
from superpose_adapters.mix import Mix
from superpose_adapters.mix_syntax import check_weight
from superpose_adapters.scoring import Scope
from superpose_server.engine.sampling import SamplingParams
from superpose_server.errors import InvalidArgument

# A quadratic model of so many weights has 45 coefficients, each of which needs a value.
MAX_FITTED = 8
MAX_BUDGET = 512

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
        min_generation: Of the default mix, or the request is refused.
    """

    prompt: Prompt
    mix: Mix | None = None
    options: SamplingParams = field(default_factory=SamplingParams)
    request_id: str = ""
    min_generation: int = 0


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
        min_generation: Of the default mix, or the request is refused.
    """

    items: tuple[ScoreItem, ...]
    mixes: tuple[Mix | None, ...] = (None,)
    max_length: int | None = None
    scope: Scope = "all"
    top_logprobs: int = 0
    min_generation: int = 0


@dataclass(frozen=True)
class MergeRequest:
    """Adapters to merge into one.

    Attributes:
        domain: What the merged adapter is called.
        mix: Which adapters, and their weights; None: the default mix. It may hold named mixes.
        method: How.
        replace: Whether another adapter of this name is replaced.
    """

    domain: str
    mix: Mix | None
    method: Method
    replace: bool = False


@dataclass(frozen=True)
class FitRequest:
    """Rows to fit the weights of a mix on.

    Attributes:
        items: As of a `ScoreRequest`.
        domains: Whose weights are fitted.
        max_length: As of a `ScoreRequest`.
        scope: As of a `ScoreRequest`.
        budget: Mixes that the search may score; None: 20 and 10 for each domain.
        low: Least weight.
        high: Greatest weight.
        penalty: Nats a token for each unit of weight.
        seed: Of the search and of the intervals.
        sources: Of each item a number that it shares with what comes from the same source, of each
            of which as large a part is held out; empty: all come from one.

    Raises:
        InvalidArgument: Anything but the items and the names of the domains is out of its range.
    """

    items: tuple[ScoreItem, ...]
    domains: tuple[str, ...]
    max_length: int | None = None
    scope: Scope = "all"
    budget: int | None = None
    low: float = -1.0
    high: float = 2.0
    penalty: float = 0.01
    seed: int = 0
    sources: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        """Check all that needs neither a base nor a registry."""
        if self.sources and len(self.sources) != len(self.items):
            raise InvalidArgument(
                f"sources has {len(self.sources)} numbers for {len(self.items)} items: send one "
                "for each, or none",
                "BAD_SOURCES",
                field="sources",
            )
        if not 1 <= len(self.domains) <= MAX_FITTED:
            raise InvalidArgument(
                f"domains has {len(self.domains)} names: fit 1 to {MAX_FITTED}",
                "BAD_DOMAIN_COUNT",
                field="domains",
            )
        twice = [name for name in self.domains if self.domains.count(name) > 1]
        if twice:
            raise InvalidArgument(
                f"domains names {twice[0]} twice: name each domain once",
                "DOMAIN_TWICE",
                field="domains",
            )
        if not 1 <= self.most_evaluations <= MAX_BUDGET:
            raise InvalidArgument(
                f"budget is {self.budget}: use 1 to {MAX_BUDGET}", "BAD_BUDGET", field="budget"
            )
        for name, bound in (("low", self.low), ("high", self.high)):
            try:
                check_weight(f"bound {name}", bound)
            except ValueError as error:
                raise InvalidArgument(str(error), "BAD_BOUNDS", field=name) from error
        if not self.low < self.high:
            raise InvalidArgument(
                f"low is {self.low:g} and high is {self.high:g}: low must be below high",
                "BAD_BOUNDS",
                field="low",
            )
        if not 0 <= self.penalty < math.inf:
            raise InvalidArgument(
                f"penalty is {self.penalty:g}: use 0 or more nats a token",
                "BAD_PENALTY",
                field="penalty",
            )

    @property
    def most_evaluations(self) -> int:
        """Mixes that the search may score."""
        return 20 + 10 * len(self.domains) if self.budget is None else self.budget

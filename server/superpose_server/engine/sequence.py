"""A request as the engine knows it: a row of the batch, from its prompt to its last token."""

from __future__ import annotations

import enum
import time
from collections.abc import Callable
from collections.abc import Sequence as SequenceOf
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field

from superpose_adapters.mix import BoundMix
from superpose_server.engine.logprobs import Logprobs, TopLogprobs
from superpose_server.engine.sampling import SamplingParams
from superpose_server.engine.tokenizer import Detokenizer, Tokenizer


class FinishReason(enum.Enum):
    """Why a row ended."""

    STOP = "stop"
    LENGTH = "length"
    ABORTED = "aborted"


@dataclass(frozen=True)
class Chunk:
    """What one step added to a row, or why the row ended early.

    Attributes:
        text: New text; may be empty, since text waits for whole characters and stop strings.
        token_ids: New tokens.
        logprobs: Of each new token, natural logarithm, of the model's own distribution; if asked
            for.
        finish_reason: Set in the last chunk.
        error: Set in the last chunk of a row that failed.
        top_logprobs: The likeliest tokens in the place of each new token, as `logprobs`.
    """

    text: str = ""
    token_ids: tuple[int, ...] = ()
    logprobs: tuple[float, ...] = ()
    finish_reason: FinishReason | None = None
    error: Exception | None = None
    top_logprobs: tuple[TopLogprobs, ...] = ()

    @property
    def last(self) -> bool:
        """True if nothing follows."""
        return self.finish_reason is not None or self.error is not None


Sink = Callable[[Chunk], None]


@dataclass(frozen=True)
class Times:
    """When things happened to a row, in seconds of `time.monotonic`."""

    accepted: float
    started: float
    first_token: float
    finished: float


@dataclass(eq=False)
class Sequence:
    """One row. Made by any thread; after `Engine.submit` only the engine thread touches it.

    `computed` counts the tokens, those of the prompt first, whose keys and values are in the cache.
    `begun_as` is how long the text was when its first token ran last.
    `cancelled` is the exception: any thread may set it, and the row leaves at the next step. What
    runs rows elsewhere is told by `on_cancel`.
    `ended` is set when the last chunk was handed out.
    """

    prompt: SequenceOf[int]
    mix: BoundMix
    params: SamplingParams
    sink: Sink
    tokenizer: Tokenizer
    tokens: list[int] = field(default_factory=list)
    computed: int = 0
    begun_as: int = 0
    cancelled: bool = False
    on_cancel: Callable[[], object] | None = None
    ended: bool = False
    accepted: float = field(default_factory=time.monotonic)
    started: float = 0.0
    first_token: float = 0.0

    def __post_init__(self) -> None:
        """Set up the row's own random numbers and text."""
        self.generator = self.params.generator()
        self.history = self.params.history(self.prompt)
        self._detokenizer = Detokenizer(self.tokenizer, self.params.stop, self.prompt)
        # No text holds a special token, so one that is a stop string is met as a token.
        special = self.tokenizer.special
        stops = {special[text] for text in self.params.stop if text in special}
        if not self.params.ignore_eos:
            stops |= self.tokenizer.ends
        self.stop_token_ids = frozenset(stops).union(self.params.stop_token_ids)

    def cancel(self) -> None:
        """Let the row leave soon; to one that has ended this says nothing new."""
        self.cancelled = True
        if self.on_cancel is not None:
            self.on_cancel()

    @property
    def length(self) -> int:
        """Tokens so far, of prompt and answer."""
        return len(self.prompt) + len(self.tokens)

    @property
    def decoding(self) -> bool:
        """True if all but the newest token have run, and every step adds one."""
        return bool(self.tokens) and self.computed == self.length - 1

    def next_ids(self, count: int) -> SequenceOf[int]:
        """Return up to `count` tokens that have not run yet."""
        ids = [*self.prompt, *self.tokens] if self.tokens else self.prompt
        return ids[self.computed : self.computed + count]

    @property
    def _long_enough(self) -> bool:
        return len(self.tokens) >= self.params.min_new_tokens

    @property
    def forbidden(self) -> AbstractSet[int]:
        """Tokens that may not be chosen yet: those that would end the text too soon."""
        return frozenset() if self._long_enough else self.stop_token_ids

    def append(self, token: int, logprobs: Logprobs) -> Chunk:
        """Add the token that a step chose and return what the client is to see of it."""
        self.tokens.append(token)
        if self.history is not None:
            self.history.append(token)
        may_stop = self._long_enough
        text = self._detokenizer.push(token, may_stop=may_stop)
        reason = None
        if self._detokenizer.stopped or (token in self.stop_token_ids and may_stop):
            reason = FinishReason.STOP
        elif len(self.tokens) >= self.params.limit:
            reason = FinishReason.LENGTH
        if reason is not None:
            text += self._detokenizer.finish(may_stop=may_stop)
            if self._detokenizer.stopped:
                reason = FinishReason.STOP
        return Chunk(
            text,
            (token,),
            () if logprobs.chosen is None else (logprobs.chosen,),
            reason,
            top_logprobs=() if logprobs.top is None else (logprobs.top,),
        )

    def abort(self) -> Chunk:
        """Return the last chunk of a row that the server ends early."""
        rest = self._detokenizer.finish(may_stop=self._long_enough)
        return Chunk(rest, finish_reason=FinishReason.ABORTED)

    def times(self) -> Times:
        """Return the row's times, as of its end."""
        return Times(self.accepted, self.started, self.first_token, time.monotonic())

"""What a request asks of sampling; `choosing` does it."""

from __future__ import annotations

import math
import random
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from superpose_server.engine.penalties import History, Penalties
from superpose_server.errors import InvalidArgument

# Tokens to make where a request does not say how many.
_DEFAULT_LIMIT = 64
_MAX_STOPS = 16
# Far below any vocabulary, so that something is left to choose while they are forbidden.
_MAX_STOP_TOKENS = 64
_MAX_STOP_LENGTH = 256
# As OpenAI has them; beyond 100 a bias says no more than that.
_MAX_BIASED = 1024
_MAX_BIAS = 100
_MAX_TOP_LOGPROBS = 20


@dataclass(frozen=True)
class SamplingParams:
    """Parameters of a request; field names as on the wire.

    Attributes:
        max_new_tokens: None: 64, or what the context leaves if that is less.
        min_new_tokens: As many tokens are made before the text may end: until then no stop token is
            chosen, and what spells a stop string is text. A stop string counts if its last
            character comes with this token or a later one, wherever it began.
        repetition_penalty: See `Penalties`, as frequency_penalty and presence_penalty.
        logit_bias: What is added to the logits of tokens, after the penalties.
        logprobs: Of each new token, of the model's own distribution: before penalties, bias and
            temperature.
        top_logprobs: As many of the likeliest tokens at each place, with their log-probabilities,
            likewise.
    """

    max_new_tokens: int | None = None
    min_new_tokens: int = 0
    ignore_eos: bool = False
    stop_token_ids: tuple[int, ...] = ()
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    stop: tuple[str, ...] = ()
    seed: int | None = None
    logprobs: bool = False
    repetition_penalty: float = 1.0
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    top_logprobs: int = 0

    def __post_init__(self) -> None:
        """Refuse values that mean nothing.

        Raises:
            InvalidArgument: Names the field and the range.
        """
        if self.limit < 1:
            _refuse("max_new_tokens", self.limit, "at least 1")
        if not 0 <= self.min_new_tokens <= self.limit:
            allowed = f"from 0 to max_new_tokens, which is {self.limit}"
            _refuse("min_new_tokens", self.min_new_tokens, allowed)
        if not (math.isfinite(self.temperature) and 0 <= self.temperature <= 100):
            _refuse("temperature", self.temperature, "from 0 (greedy) to 100")
        if not 0 < self.top_p <= 1:
            _refuse("top_p", self.top_p, "above 0 and at most 1")
        if not 0 <= self.min_p <= 1:
            _refuse("min_p", self.min_p, "from 0 to 1")
        if len(self.stop) > _MAX_STOPS:
            _refuse("stop", f"{len(self.stop)} strings", f"at most {_MAX_STOPS}")
        if len(self.stop_token_ids) > _MAX_STOP_TOKENS:
            _refuse(
                "stop_token_ids", f"{len(self.stop_token_ids)} ids", f"at most {_MAX_STOP_TOKENS}"
            )
        if not 0.01 <= self.repetition_penalty <= 100:
            _refuse("repetition_penalty", self.repetition_penalty, "from 0.01 to 100; 1 is none")
        for name in ("frequency_penalty", "presence_penalty"):
            if not -2 <= (value := getattr(self, name)) <= 2:
                _refuse(name, value, "from -2 to 2")
        if len(self.logit_bias) > _MAX_BIASED:
            _refuse("logit_bias", f"{len(self.logit_bias)} tokens", f"at most {_MAX_BIASED}")
        for token, bias in self.logit_bias.items():
            if not -_MAX_BIAS <= bias <= _MAX_BIAS:
                allowed = f"from -{_MAX_BIAS} to {_MAX_BIAS}"
                _refuse("logit_bias", f"{bias} for token {token}", allowed)
        if not 0 <= self.top_logprobs <= _MAX_TOP_LOGPROBS:
            _refuse("top_logprobs", self.top_logprobs, f"from 0 to {_MAX_TOP_LOGPROBS}")
        for text in self.stop:
            if not 1 <= len(text) <= _MAX_STOP_LENGTH:
                _refuse("stop", f"{len(text)} characters", f"1 to {_MAX_STOP_LENGTH} characters")

    @property
    def limit(self) -> int:
        """Tokens that are made at most."""
        return _DEFAULT_LIMIT if self.max_new_tokens is None else self.max_new_tokens

    def within(self, room: int) -> SamplingParams:
        """Return these with what is left open about the length decided for `room` tokens.

        Raises:
            InvalidArgument: `room` is less than min_new_tokens, or none.
        """
        if self.max_new_tokens is not None:
            return self
        return replace(self, max_new_tokens=min(self.limit, room))

    def generator(self) -> random.Random:
        """Return the row's own source of random numbers.

        Python's, because torch's on the CPU uses the low 32 bits of a seed only.
        """
        return random.Random(secrets.randbits(64) if self.seed is None else self.seed)

    def history(self, prompt: Sequence[int]) -> History | None:
        """Return what the penalties look at, of a text that begins; None without penalties."""
        penalties = Penalties(
            self.repetition_penalty, self.frequency_penalty, self.presence_penalty
        )
        return History(penalties, prompt, self.limit) if penalties else None


def _refuse(field: str, value: object, allowed: str) -> None:
    raise InvalidArgument(f"{field} is {value}: use {allowed}", "INVALID_SAMPLING", field=field)

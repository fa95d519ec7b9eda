"""How the next token is chosen from the logits.

Each row that is not greedy draws one uniform number a token from a generator of its own, so that
the same seed gives the same random numbers whatever else is in the batch.
"""

from __future__ import annotations

import math
import random
import secrets
from collections.abc import Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from superpose_server.errors import InvalidArgument

# Tokens to make where a request does not say how many.
_DEFAULT_LIMIT = 64
_MAX_STOPS = 16
# Far below any vocabulary, so that something is left to choose while they are forbidden.
_MAX_STOP_TOKENS = 64
_MAX_STOP_LENGTH = 256


@dataclass(frozen=True)
class SamplingParams:
    """What a request asks of sampling; field names as on the wire.

    Attributes:
        max_new_tokens: None: 64, or what the context leaves if that is less.
        min_new_tokens: As many tokens are made before the text may end: until then no stop token is
            chosen, and what spells a stop string is text. A stop string counts if its last
            character comes with this token or a later one, wherever it began.
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

    @property
    def filters(self) -> bool:
        """True if only some of the likeliest tokens may be drawn."""
        return self.top_k > 0 or self.top_p < 1 or self.min_p > 0

    def generator(self) -> random.Random:
        """Return the row's own source of random numbers.

        Python's, because torch's on the CPU uses the low 32 bits of a seed only.
        """
        return random.Random(secrets.randbits(64) if self.seed is None else self.seed)


def _refuse(field: str, value: object, allowed: str) -> None:
    raise InvalidArgument(f"{field} is {value}: use {allowed}", "INVALID_SAMPLING", field=field)


def sample(
    logits: Tensor,
    params: Sequence[SamplingParams],
    generators: Sequence[random.Random],
    forbidden: Sequence[AbstractSet[int]],
) -> tuple[list[int], list[bool]]:
    """Choose one token a row.

    Args:
        logits: float32 (rows, vocabulary).
        params: One a row.
        generators: One a row; a row that is not greedy draws one number from its own.
        forbidden: Tokens that a row may not be given, one set a row. Ids that the base has no
            logits for, as some tokenizers hold them, it cannot be given anyway.

    Returns:
        The tokens, and for each row whether its logits can be drawn from: a NaN or +inf among them,
        or nothing but -inf, makes its token meaningless.
    """
    peaks, tokens = logits.max(dim=-1)  # A NaN wins.
    finite = torch.isfinite(peaks)
    limited = [row for row, tokens_of_row in enumerate(forbidden) if tokens_of_row]
    allowed = logits
    if limited:
        allowed = logits.clone()
        for row in limited:
            ids = [token for token in forbidden[row] if token < logits.shape[1]]
            allowed[row, ids] = -torch.inf
        tokens[limited] = allowed[limited].argmax(dim=-1)
    drawing = [row for row, p in enumerate(params) if p.temperature > 0]
    # A row takes the same path, and so the same token, whoever else is in the batch.
    for rows, draw in (
        ([row for row in drawing if not params[row].filters], _draw_any),
        ([row for row in drawing if params[row].filters], _draw_filtered),
    ):
        if rows:
            chosen = [params[row] for row in rows]
            uniform = _column([generators[row].random() for row in rows], logits.device)
            temperature = _column([p.temperature for p in chosen], logits.device)
            # The maximum is taken out first, so that a small temperature cannot overflow; a row
            # that is not finite is drawn from zeros, and its token is not used.
            part = allowed[rows].masked_fill(~finite[rows][:, None], 0.0)
            scaled = (part - part.amax(-1, keepdim=True)).double() / temperature
            tokens[rows] = draw(scaled, chosen, uniform)
    # One copy from the device for both.
    found = torch.stack((tokens, finite.long())).tolist()
    return found[0], [bool(fine) for fine in found[1]]


def _column(values: Sequence[float], device: torch.device) -> Tensor:
    # float64, since in float32 a small temperature is 0.
    return torch.tensor(values, dtype=torch.float64, device=device)[:, None]


def _draw(weights: Tensor, uniform: Tensor) -> Tensor:
    """Invert the cumulative sums of weights (rows, tokens) at `uniform` (rows, 1) of their ends."""
    cumulative = weights.cumsum(dim=-1)
    choice = torch.searchsorted(cumulative, uniform * cumulative[:, -1:], right=True)
    # Rounding may reach the very end, where tokens of weight 0 may stand.
    ends = torch.arange(1, weights.shape[1] + 1, device=weights.device)
    last = torch.where(weights > 0, ends, 0).amax(dim=-1, keepdim=True) - 1
    return torch.minimum(choice, last)[:, 0]


def _draw_any(scaled: Tensor, params: Sequence[SamplingParams], uniform: Tensor) -> Tensor:
    """Draw from all tokens, in the order of their ids."""
    return _draw(scaled.softmax(dim=-1), uniform)


def _draw_filtered(scaled: Tensor, params: Sequence[SamplingParams], uniform: Tensor) -> Tensor:
    """Draw from what top_k, top_p and min_p keep; the likeliest first, ties by token id.

    min_p: Minh et al., Turning up the heat, 2024 (arXiv 2407.01082).
    """
    ordered, order = scaled.sort(dim=-1, descending=True, stable=True)
    probabilities = ordered.softmax(dim=-1)
    rank = torch.arange(ordered.shape[1], device=scaled.device)
    everything = ordered.shape[1]
    top_k = _column([p.top_k or everything for p in params], scaled.device)
    top_p = _column([p.top_p for p in params], scaled.device)
    before = probabilities.cumsum(dim=-1) - probabilities
    min_p = _column([p.min_p for p in params], scaled.device)
    kept = (rank < top_k) & ((before < top_p) | (top_p >= 1))
    # Over that of the likeliest, whose logit was taken out.
    kept &= ordered.exp() >= min_p
    choice = _draw(torch.where(kept, probabilities, 0.0), uniform)
    return order.gather(1, choice[:, None])[:, 0]

"""How the next token is chosen from the logits.

Each row draws one uniform number a token from a generator of its own, so that the same seed gives
the same random numbers whatever else is in the batch.
"""

from __future__ import annotations

import math
import random
import secrets
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from superpose_server.errors import InvalidArgument

_MAX_STOPS = 16
# Far below any vocabulary, so that something is left to choose while they are forbidden.
_MAX_STOP_TOKENS = 64
_MAX_STOP_LENGTH = 256


@dataclass(frozen=True)
class SamplingParams:
    """What a request asks of sampling; field names as on the wire."""

    max_new_tokens: int = 64
    min_new_tokens: int = 0
    ignore_eos: bool = False
    stop_token_ids: tuple[int, ...] = ()
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    stop: tuple[str, ...] = ()
    seed: int | None = None
    logprobs: bool = False

    def __post_init__(self) -> None:
        """Refuse values that mean nothing.

        Raises:
            InvalidArgument: Names the field and the range.
        """
        if self.max_new_tokens < 1:
            _refuse("max_new_tokens", self.max_new_tokens, "at least 1")
        if not 0 <= self.min_new_tokens <= self.max_new_tokens:
            _refuse("min_new_tokens", self.min_new_tokens, "from 0 to max_new_tokens")
        if not (math.isfinite(self.temperature) and 0 <= self.temperature <= 100):
            _refuse("temperature", self.temperature, "from 0 (greedy) to 100")
        if not 0 < self.top_p <= 1:
            _refuse("top_p", self.top_p, "above 0 and at most 1")
        if len(self.stop) > _MAX_STOPS:
            _refuse("stop", f"{len(self.stop)} strings", f"at most {_MAX_STOPS}")
        if len(self.stop_token_ids) > _MAX_STOP_TOKENS:
            _refuse(
                "stop_token_ids", f"{len(self.stop_token_ids)} ids", f"at most {_MAX_STOP_TOKENS}"
            )
        for text in self.stop:
            if not 1 <= len(text) <= _MAX_STOP_LENGTH:
                _refuse("stop", f"{len(text)} characters", f"1 to {_MAX_STOP_LENGTH} characters")

    def generator(self) -> random.Random:
        """Return the row's own source of random numbers.

        Python's, because torch's on the CPU uses the low 32 bits of a seed only.
        """
        return random.Random(secrets.randbits(64) if self.seed is None else self.seed)


def _refuse(field: str, value: object, allowed: str) -> None:
    raise InvalidArgument(f"{field} is {value}: use {allowed}", "INVALID_SAMPLING", field=field)


def sample(
    logits: Tensor, params: Sequence[SamplingParams], generators: Sequence[random.Random]
) -> Tensor:
    """Choose one token a row.

    Args:
        logits: float32 (rows, vocabulary); -inf forbids a token.
        params: One a row.
        generators: One a row; a row that is not greedy draws one number from its own.

    Returns:
        int64 (rows,).
    """
    tokens = logits.argmax(dim=-1)
    drawing = [row for row, p in enumerate(params) if p.temperature > 0]
    if not drawing:
        return tokens
    uniform = torch.tensor(
        [generators[row].random() for row in drawing], dtype=torch.float64, device=logits.device
    )
    temperature, top_p = (
        torch.tensor(
            [getattr(params[row], name) for row in drawing],
            dtype=torch.float64,  # in float32 a small temperature is 0
            device=logits.device,
        )
        for name in ("temperature", "top_p")
    )
    top_k = torch.tensor([params[row].top_k for row in drawing], device=logits.device)
    index = torch.tensor(drawing, device=logits.device)
    tokens[index] = _draw(logits[index], temperature, top_k, top_p, uniform)
    return tokens


def _draw(
    logits: Tensor, temperature: Tensor, top_k: Tensor, top_p: Tensor, uniform: Tensor
) -> Tensor:
    """Invert the cumulative distribution of the kept tokens at `uniform` (rows,)."""
    # The maximum is taken out first, so that a small temperature cannot overflow.
    scaled = (logits - logits.amax(-1, keepdim=True)).double() / temperature[:, None]
    ordered, order = scaled.sort(dim=-1, descending=True, stable=True)
    probabilities = ordered.softmax(dim=-1)
    rank = torch.arange(ordered.shape[1], device=logits.device)
    limit = torch.where(top_k > 0, top_k, ordered.shape[1])[:, None]
    before = probabilities.cumsum(dim=-1) - probabilities
    kept = torch.where(
        (rank < limit) & ((before < top_p[:, None]) | (top_p >= 1)[:, None]), probabilities, 0.0
    )
    cumulative = kept.cumsum(dim=-1)
    target = uniform[:, None] * cumulative[:, -1:]
    choice = (cumulative <= target).sum(dim=-1, keepdim=True)
    last = (kept > 0).sum(dim=-1, keepdim=True) - 1
    return order.gather(1, torch.minimum(choice, last))[:, 0]

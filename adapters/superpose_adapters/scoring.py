"""What is scored, and how: one definition for the server's Score, the trainer and the study.

A text is scored as `text_encoder` makes it. The loss covers every token but the first, or the
answer's tokens only (end-of-text among them), and means are taken over tokens, not over texts.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from torch import Tensor

Scope = Literal["all", "answer"]


@dataclass(frozen=True, slots=True)
class EncodedText:
    """Token ids of a text, and the index of the first answer token (None for a plain text).

    Truncation may leave `answer_start` at the end of `ids` or beyond: then no answer is left.
    """

    ids: tuple[int, ...]
    answer_start: int | None = None

    def first_scored(self, scope: Scope) -> int:
        """Return the index of the first token that is scored; at least 1, at most `len(ids)`.

        Raises:
            ValueError: scope "answer" on a plain text, or a scope that does not exist.
        """
        start = 1
        if scope == "answer":
            if self.answer_start is None:
                raise ValueError('scope "answer" needs a question and an answer, not a plain text')
            start = max(1, self.answer_start)
        elif scope != "all":
            raise ValueError(f'scope must be "all" or "answer", got {scope!r}')
        return min(start, len(self.ids))


@dataclass(frozen=True, slots=True)
class Loss:
    """Sum of negative log-probabilities in nats over a number of tokens; losses add."""

    nats: float = 0.0
    tokens: int = 0

    def __add__(self, other: Loss) -> Loss:
        """Return the loss over the tokens of both: the token-weighted way to combine texts."""
        return Loss(self.nats + other.nats, self.tokens + other.tokens)

    @property
    def mean(self) -> float:
        """Nats a token.

        Raises:
            ValueError: no token was scored.
        """
        if not self.tokens:
            raise ValueError("nothing to score: no text has a second token within max_length")
        return self.nats / self.tokens

    @property
    def perplexity(self) -> float:
        """Exponential of the mean; infinity where a double cannot hold it."""
        try:
            return math.exp(self.mean)
        except OverflowError:
            return math.inf


def token_log_probabilities(logits: Tensor, ids: Tensor) -> Tensor:
    """Return the float32 log-probability of each token but the first.

    Args:
        logits: (..., n, vocabulary) in any float dtype; position i predicts token i + 1. The
            softmax is taken in float32 (in float64 if the logits are).
        ids: (..., n) token ids.

    Returns:
        (..., n - 1): entry i belongs to token i + 1.
    """
    import torch

    wide = logits[..., :-1, :].to(torch.promote_types(logits.dtype, torch.float32))
    chosen = wide.gather(-1, ids[..., 1:].unsqueeze(-1)).squeeze(-1)
    # log_softmax at one entry, without a second tensor of the logits' size.
    return (chosen - wide.logsumexp(-1)).to(torch.float32)


def loss_of(log_probabilities: Tensor, encoded: EncodedText, scope: Scope) -> Loss:
    """Return the loss of one text from its log-probabilities (len(ids) - 1 or more, if padded)."""
    first = encoded.first_scored(scope)
    last = len(encoded.ids)
    # Summed in float64: a long text must not lose digits by being long.
    nats = -log_probabilities[first - 1 : last - 1].double().sum().item() if first < last else 0.0
    return Loss(float(nats), max(0, last - first))

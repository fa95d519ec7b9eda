"""Log-probabilities of chosen tokens and of the likeliest ones, under the model's own distribution.

That is the one before penalties, bias and temperature: what the model says, not how it was sampled.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from superpose_server.engine.blocks import block_maxima, likeliest_tokens
from superpose_server.engine.sampling import SamplingParams


@dataclass(frozen=True)
class TopLogprobs:
    """The likeliest tokens at one place, the likeliest first, with their log-probabilities."""

    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]

    def first(self, count: int) -> TopLogprobs:
        """Return the `count` likeliest of them."""
        return TopLogprobs(self.token_ids[:count], self.logprobs[:count])


@dataclass(frozen=True)
class Logprobs:
    """What a row asks for at one place; None: it does not.

    Attributes:
        chosen: Of the token that was chosen, natural logarithm.
        top: The likeliest ones.
    """

    chosen: float | None = None
    top: TopLogprobs | None = None


def find_logprobs(
    params: Sequence[SamplingParams], logits: Tensor, tokens: Sequence[int]
) -> list[Logprobs]:
    """Return what each row asks for, of logits (rows, vocabulary) and the tokens that were chosen.

    Rows that ask for nothing cost nothing.
    """
    found = [Logprobs()] * len(params)
    asking = [row for row, each in enumerate(params) if each.logprobs or each.top_logprobs]
    if not asking:
        return found
    ids = torch.tensor([tokens[row] for row in asking], device=logits.device)
    most = max(params[row].top_logprobs for row in asking)
    for row, chosen, top in zip(asking, *logprobs_of(logits[asking], ids, most), strict=True):
        count = params[row].top_logprobs
        found[row] = Logprobs(
            chosen if params[row].logprobs else None, top.first(count) if count else None
        )
    return found


def logprobs_of(logits: Tensor, tokens: Tensor, top: int) -> tuple[list[float], list[TopLogprobs]]:
    """Return the log-probability of a token in each place, and the `top` likeliest tokens there.

    Args:
        logits: float32 (places, vocabulary).
        tokens: int64 (places,).
        top: May be 0, or more than the vocabulary has.
    """
    ids = tokens[:, None]
    most = min(top, logits.shape[1])
    if most:
        ids = torch.cat((ids, likeliest_tokens(logits, block_maxima(logits), most)), dim=1)
    values = (logits.gather(1, ids) - logits.logsumexp(-1, keepdim=True)).tolist()
    return [place[0] for place in values], [
        TopLogprobs(tuple(tokens[1:]), tuple(place[1:]))
        for tokens, place in zip(ids.tolist(), values, strict=True)
    ]

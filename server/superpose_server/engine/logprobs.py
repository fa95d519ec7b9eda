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
    asked = logits[asking]
    ids = torch.tensor([tokens[row] for row in asking], device=logits.device)[:, None]
    most = min(max(params[row].top_logprobs for row in asking), logits.shape[1])
    if most:
        ids = torch.cat((ids, likeliest_tokens(asked, block_maxima(asked), most)), dim=1)
    values = (asked.gather(1, ids) - asked.logsumexp(-1, keepdim=True)).tolist()
    for row, of_row, (chosen, *others) in zip(asking, ids.tolist(), values, strict=True):
        count = params[row].top_logprobs
        top = TopLogprobs(tuple(of_row[1 : count + 1]), tuple(others[:count])) if count else None
        found[row] = Logprobs(chosen if params[row].logprobs else None, top)
    return found

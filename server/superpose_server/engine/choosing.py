"""How the next token of each row is chosen from the logits.

Penalties and bias come first, then temperature, top_k, top_p and min_p. Each row that is not greedy
draws from a generator of its own, so that the same seed gives the same random numbers whatever else
is in the batch.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from collections.abc import Set as AbstractSet

import torch
from torch import Tensor

from superpose_server.engine.blocks import block_maxima, likeliest_token
from superpose_server.engine.drawing import draw_from_all, draw_from_likeliest
from superpose_server.engine.penalties import History, adjusted
from superpose_server.engine.sampling import SamplingParams

_Path = Callable[[Tensor, Tensor, Sequence[SamplingParams], Sequence[random.Random]], Tensor]


def choose(
    logits: Tensor,
    params: Sequence[SamplingParams],
    generators: Sequence[random.Random],
    forbidden: Sequence[AbstractSet[int]],
    histories: Sequence[History | None],
) -> tuple[list[int], list[bool]]:
    """Choose one token a row.

    Args:
        logits: float32 (rows, vocabulary); they stay as they are.
        params: One a row.
        generators: One a row; a row that is not greedy draws from its own.
        forbidden: Tokens that a row may not be given, one set a row.
        histories: What the penalties of a row look at, if it has any.

    Returns:
        The tokens, and for each row whether its logits can be drawn from: a NaN or +inf among them,
        or nothing but -inf, makes its token meaningless.
    """
    maxima = block_maxima(logits)
    finite = torch.isfinite(maxima.amax(-1))  # A NaN wins.
    allowed = adjusted(logits, histories, [p.logit_bias for p in params], forbidden)
    if allowed is not logits:
        maxima = block_maxima(allowed)
    tokens = torch.empty(len(params), dtype=torch.int64, device=logits.device)
    # A row takes the same path, and so the same token, whoever else is in the batch.
    paths: dict[_Path, list[int]] = {}
    for row, asked in enumerate(params):
        paths.setdefault(_path(asked), []).append(row)
    for path, rows in paths.items():
        everyone = len(rows) == len(params)
        tokens[rows] = path(
            allowed if everyone else allowed[rows],
            maxima if everyone else maxima[rows],
            [params[row] for row in rows],
            [generators[row] for row in rows],
        )
    # One copy from the device for both.
    found = torch.stack((tokens, finite.long())).tolist()
    return found[0], [bool(fine) for fine in found[1]]


def _path(params: SamplingParams) -> _Path:
    if params.temperature == 0:
        return _greedy
    return draw_from_likeliest if params.top_k else draw_from_all


def _greedy(logits: Tensor, maxima: Tensor, *_: object) -> Tensor:
    return likeliest_token(logits, maxima)

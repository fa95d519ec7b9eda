"""The vocabulary in blocks of neighbouring tokens, whose maxima tell where the likeliest ones are.

The maxima are one pass over the logits. What else is asked of the likeliest tokens is then found in
a few blocks, without a look at the rest of the vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor

# Tokens a block: enough that a row has few maxima, so few that the blocks to look into are short.
BLOCK = 64


def block_maxima(logits: Tensor) -> Tensor:
    """Return the largest of each block, (rows, blocks), of logits (rows, vocabulary).

    The last block may be short. A NaN is larger than anything.
    """
    rows, vocabulary = logits.shape
    blocks, rest = divmod(vocabulary, BLOCK)
    maxima = logits[:, : vocabulary - rest].view(rows, blocks, BLOCK).amax(-1)
    if not rest:
        return maxima
    return torch.cat((maxima, logits[:, -rest:].amax(-1, keepdim=True)), dim=1)


def likeliest_token(logits: Tensor, maxima: Tensor) -> Tensor:
    """Return the id of the likeliest token of each row, (rows,); the lowest one of equals."""
    ids, values = tokens_of_blocks(logits, maxima.argmax(-1, keepdim=True))
    return ids.gather(1, values.argmax(-1, keepdim=True))[:, 0]


def likeliest_tokens(logits: Tensor, maxima: Tensor, count: int) -> Tensor:
    """Return the ids of the `count` likeliest tokens of each row, (rows, count), in their order.

    The likelier one first, and of equals the lower id.

    Args:
        logits: float32 (rows, vocabulary).
        maxima: Those of `block_maxima`.
        count: At most the vocabulary.
    """
    # A block that holds one of them holds it as its largest, or beside a larger one: so it is among
    # the `count` first blocks, in the order of their largest.
    blocks = _order(maxima, torch.arange(maxima.shape[1], device=logits.device))
    ids, values = tokens_of_blocks(logits, blocks.topk(min(count, maxima.shape[1])).indices)
    return ids.gather(1, _order(values, ids).topk(count).indices)


def tokens_of_blocks(logits: Tensor, blocks: Tensor) -> tuple[Tensor, Tensor]:
    """Return ids and logits of the tokens of some blocks (rows, n), both (rows, n * BLOCK)."""
    inner = torch.arange(BLOCK, device=logits.device)
    ids = (blocks[:, :, None] * BLOCK + inner).flatten(1)
    last = logits.shape[1] - 1
    values = logits.gather(1, ids.clamp(max=last))
    # What the last block lacks comes behind every token, by its id.
    return ids, values.masked_fill_(ids > last, -torch.inf)


def _order(values: Tensor, ids: Tensor) -> Tensor:
    """Return int64 keys, no two of them equal, that grow with the value and fall with the id."""
    # Adding 0 makes the two zeros one. Bits of negative numbers grow with their size.
    bits = (values + 0.0).view(torch.int32)
    return (bits ^ ((bits >> 31) & 0x7FFFFFFF)).long() * 2**32 - ids

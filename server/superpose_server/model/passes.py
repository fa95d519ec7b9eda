"""Ways to run a batch through a transformers model, from the fastest to the most general.

All give the logits of the same tokens; which one a base can take, `survey.py` finds out.
"""

from __future__ import annotations

import enum
import inspect
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from superpose_server.model.batch import Batch
from superpose_server.model.cache import SlotCache


class Way(enum.Enum):
    """How rows run."""

    SHARED = "many rows in a pass, with attention of our own"
    ROWS = "a row a pass, with the base's own attention"
    WHOLE = "a row a pass, from its first token on, since the base has no key-value cache"


def shared_pass(module: Any, cache: Any, batch: Batch, keep: Tensor) -> Tensor:
    """Run tokens of any rows; attention reads `batch`.

    Returns:
        float32 (len(keep), vocabulary), as all of these.
    """
    logits: Tensor = module(
        input_ids=batch.ids[None],
        position_ids=batch.positions[None],
        past_key_values=cache,
        use_cache=False,
        logits_to_keep=keep,
        batch=batch,
    ).logits
    return logits[0].float()


def row_pass(module: Any, cache: SlotCache, batch: Batch, keep: Tensor) -> Tensor:
    """Run tokens of one row as transformers' own `generate` does."""
    [span] = batch.spans
    seen = torch.ones(1, span.end - span.start, dtype=torch.int64, device=batch.ids.device)
    row = cache.row(batch)
    return _alone(module, batch, keep, past_key_values=row, use_cache=True, attention_mask=seen)


def whole_pass(module: Any, cache: object, batch: Batch, keep: Tensor) -> Tensor:
    """Run a whole row without any cache."""
    return _alone(module, batch, keep, attention_mask=torch.ones_like(batch.ids[None]))


@lru_cache(maxsize=4)
def _arguments(forward: Callable[..., Any]) -> frozenset[str]:
    return frozenset(inspect.signature(forward).parameters)


def _alone(module: Any, batch: Batch, keep: Tensor, **more: Any) -> Tensor:
    accepts = _arguments(type(module).forward)
    if "position_ids" in accepts:
        more["position_ids"] = batch.positions[None]
    if "logits_to_keep" in accepts:
        more["logits_to_keep"] = keep
    logits: Tensor = module(input_ids=batch.ids[None], **more).logits[0]
    if "logits_to_keep" not in accepts:
        logits = logits[keep]
    return logits.float()

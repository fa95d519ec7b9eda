"""Attention over the slots of the cache, as a transformers attention implementation.

Each token reads what its own row has written, up to itself, and nothing else. Two ways to the same
result: a kernel that reads exactly those positions, and torch's scaled_dot_product_attention
wherever the kernels do not run, with masks and, for prompts of different lengths, padding.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface

from superpose_server.model.batch import Batch

KERNEL = "superpose_kernel"
TORCH = "superpose_torch"


def attend_by_kernel(
    module: nn.Module,
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    attention_mask: None,
    *,
    batch: Batch,
    scaling: float | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Return (1, tokens, heads, head_dim) from query (1, heads, tokens, head_dim) and the slots."""
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    attended = torch.ops.superpose.attend(
        query, keys, values, batch.slots, batch.starts, batch.written, scale
    )
    return cast(Tensor, attended), None


def attend_by_torch(
    module: nn.Module,
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    attention_mask: None,
    *,
    batch: Batch,
    scaling: float | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Like `attend_by_kernel`; decoding rows in one call, prompts in one call a `_Group`."""
    grouped = query.shape[1] != keys.shape[1]
    if batch.decodes:
        slots = [span.slot for span in batch.spans]
        length = max(span.end for span in batch.spans)
        readable = torch.arange(length, device=query.device) <= batch.written[:, None]
        # Rows fill slots 0..n-1 but for those whose prompts are still run: mostly a view.
        picked = slice(len(slots)) if slots == list(range(len(slots))) else batch.slots
        attended = scaled_dot_product_attention(
            query[0].transpose(0, 1)[:, :, None],
            keys[picked, :, :length],
            values[picked, :, :length],
            attn_mask=readable[:, None, None],
            scale=scaling,
            enable_gqa=grouped,
        )  # (tokens, heads, 1, head_dim)
        return attended[:, :, 0][None], None
    groups, order = _groups(batch)
    parts = []
    for group in groups:
        # Advanced indexes around the heads' slice give (spans, positions, heads, head_dim).
        read = (group.slots, slice(None), group.positions)
        attended = scaled_dot_product_attention(
            query[0][:, group.tokens].transpose(0, 1),
            keys[read].transpose(1, 2),
            values[read].transpose(1, 2),
            attn_mask=group.readable,
            scale=scaling,
            enable_gqa=grouped,
        )  # (spans, heads, longest, head_dim)
        parts.append(attended.transpose(1, 2).flatten(0, 1))
    return torch.cat(parts)[order][None], None


@dataclass(frozen=True)
class _Group:
    """Spans of about one length that read about as much, filled up to the longest of them.

    Attributes:
        tokens: int64 (spans, longest), index of each token; a span's last one fills it up.
        slots: int64 (spans, 1).
        positions: int64 (spans, most), what each span reads of its slot.
        readable: bool (spans, 1, longest, most).
    """

    tokens: Tensor
    slots: Tensor
    positions: Tensor
    readable: Tensor


# Every layer of a pass asks for the same.
@lru_cache(maxsize=1)
def _groups(batch: Batch) -> tuple[list[_Group], Tensor]:
    """Return groups whose padding is at most half in either direction, and the tokens' places.

    Result [i] of the second is where token i comes in the groups' tokens, laid end to end.
    """
    device = batch.ids.device
    ends = list(accumulate((len(span.ids) for span in batch.spans), initial=0))
    sizes: dict[tuple[int, int], list[int]] = {}
    for i, span in enumerate(batch.spans):
        size = (len(span.ids).bit_length(), (span.end - span.start).bit_length())
        sizes.setdefault(size, []).append(i)
    groups = []
    places = [0] * ends[-1]
    done = 0
    for members in sizes.values():
        spans = [batch.spans[i] for i in members]
        longest = max(len(span.ids) for span in spans)
        most = max(span.end - span.start for span in spans)
        tokens = [[min(ends[i] + at, ends[i + 1] - 1) for at in range(longest)] for i in members]
        positions = [[min(s.start + at, s.end - 1) for at in range(most)] for s in spans]
        for row, i in enumerate(members):
            for at in range(len(batch.spans[i].ids)):
                places[ends[i] + at] = done + row * longest + at
        done += len(members) * longest
        of_tokens = torch.tensor(tokens, device=device)
        starts = torch.tensor([[span.start] for span in spans], device=device)
        # Before the clamp above, so that what only fills a row up is not read twice.
        read = starts + torch.arange(most, device=device)
        groups.append(
            _Group(
                of_tokens,
                torch.tensor([[span.slot] for span in spans], device=device),
                torch.tensor(positions, device=device),
                (read[:, None] <= batch.written[of_tokens][:, :, None])[:, None],
            )
        )
    return groups, torch.tensor(places, device=device)


AttentionInterface.register(KERNEL, attend_by_kernel)
AttentionInterface.register(TORCH, attend_by_torch)

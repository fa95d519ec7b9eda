"""Attention over the slots of the cache, as a transformers attention implementation.

Each token reads what its own row has written, up to itself, and nothing else: there is no mask and
no padding. Two ways to the same result: a kernel that reads exactly those positions, and torch's
scaled_dot_product_attention wherever the kernels do not run.
"""

from __future__ import annotations

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
    """Like `attend_by_kernel`; decoding rows together, prompts one at a time."""
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
    parts = []
    done = 0
    for span in batch.spans:
        window = slice(span.start, span.end)
        tokens = slice(done, done + len(span.ids))
        written = batch.written[tokens, None]
        readable = torch.arange(span.start, span.end, device=query.device) <= written
        parts.append(
            scaled_dot_product_attention(
                query[:, :, tokens],
                keys[span.slot : span.slot + 1, :, window],
                values[span.slot : span.slot + 1, :, window],
                attn_mask=readable,
                scale=scaling,
                enable_gqa=grouped,
            )
        )
        done = tokens.stop
    return torch.cat(parts, dim=2).transpose(1, 2), None


AttentionInterface.register(KERNEL, attend_by_kernel)
AttentionInterface.register(TORCH, attend_by_torch)

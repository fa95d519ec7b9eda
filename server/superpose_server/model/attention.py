"""Attention over the slots of the cache, as a transformers attention implementation.

Each token reads what its own row has written, up to itself, and nothing else; where its layer has a
window, the last of those only. Two ways to the same result: a kernel that reads exactly those
positions, and torch wherever the kernels do not run, with masks and, for prompts of different
lengths, padding.
"""

from __future__ import annotations

from collections.abc import Mapping
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

# What models hand to their attention that changes nothing here: dropout is the trainer's, and of
# windows the mask decides in transformers too (see `survey.py`).
_WITHOUT_EFFECT = frozenset({"dropout", "sliding_window", "position_ids", "use_cache"})


class UnknownAttention(ValueError):
    """A model asks of attention what is not done here; the message continues "its attention"."""


def own_attention(model_class: Any) -> str | None:
    """Return by which attention transformers' own passes of a class are run.

    The eager one, which alone honours every argument that a class gives to transformers' interface.
    Where a class has attention of its own, None, which is what transformers chooses: its eager form
    may be another model than the rest (Falcon's adds ALiBi twice).
    """
    return "eager" if model_class._supports_attention_backend else None


def use_own_attention(module: Any) -> None:
    """Let a transformers model attend by its `own_attention` again."""
    own = own_attention(type(module))
    if own is not None:
        module.set_attn_implementation(own)


def refuse_unknown(mask: object, others: Mapping[str, object]) -> None:
    """Refuse whatever a model asks of its attention beyond what is named in the signatures below.

    Raises:
        UnknownAttention: A mask of the model's own, or an argument that might change the result.
    """
    if mask is not None:
        raise UnknownAttention("takes a mask of its own")
    for name, value in others.items():
        without_effect = name in _WITHOUT_EFFECT or (name == "is_causal" and value is True)
        if not (without_effect or value is None or (value is False and name != "is_causal")):
            raise UnknownAttention(f"takes {name}, which is not known here")


def window_of(module: nn.Module) -> int | None:
    """Return how many tokens a layer's attention sees, itself included; None: all.

    Set once by `survey.py`.
    """
    return cast("int | None", getattr(module, "superpose_window", None))


def attend_by_kernel(
    module: nn.Module,
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    attention_mask: None,
    *,
    batch: Batch,
    scaling: float | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """Return (1, tokens, heads, head_dim) from query (1, heads, tokens, head_dim) and the slots.

    Args:
        module: The attention, whose window is `window_of` it.
        query: Of every token.
        keys: Of all slots, (slots, key heads, length, head_dim).
        values: As `keys`.
        attention_mask: None: the batch says who sees what.
        batch: What runs.
        scaling: Of query times key; None: 1 / sqrt(head_dim).
        softcap: c of c tanh(score / c), arXiv 2408.00118; None: no cap.
        s_aux: Attention sinks, (heads,): a score without a value for each head.
        others: What is refused unless it changes nothing.

    Raises:
        UnknownAttention: See `refuse_unknown`.
    """
    refuse_unknown(attention_mask, others)
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    attended = torch.ops.superpose.attend(
        *(query, keys, values, batch.slots, batch.starts, batch.written, scale),
        *(window_of(module), softcap, s_aux),
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
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """Like `attend_by_kernel`; decoding rows in one call, prompts in one call a `_Group`."""
    refuse_unknown(attention_mask, others)
    window = window_of(module)
    if batch.decodes:
        slots = [span.slot for span in batch.spans]
        length = max(span.end for span in batch.spans)
        places = torch.arange(length, device=query.device)
        readable = places <= batch.written[:, None]
        if window is not None:
            readable &= places > batch.written[:, None] - window
        # Rows fill slots 0..n-1 but for those whose prompts are still run: mostly a view.
        picked = slice(len(slots)) if slots == list(range(len(slots))) else batch.slots
        attended = _attend(
            query[0].transpose(0, 1)[:, :, None],
            keys[picked, :, :length],
            values[picked, :, :length],
            readable[:, None, None],
            scaling,
            softcap,
            s_aux,
        )  # (tokens, heads, 1, head_dim)
        # Contiguous, since models view it in other shapes.
        return attended[:, :, 0][None].contiguous(), None
    groups, order = _groups(batch, window)
    parts = []
    for group in groups:
        # Advanced indexes around the heads' slice give (spans, positions, heads, head_dim).
        read = (group.slots, slice(None), group.positions)
        attended = _attend(
            query[0][:, group.tokens].transpose(0, 1),
            keys[read].transpose(1, 2),
            values[read].transpose(1, 2),
            group.readable,
            scaling,
            softcap,
            s_aux,
        )  # (spans, heads, longest, head_dim)
        parts.append(attended.transpose(1, 2).flatten(0, 1))
    return torch.cat(parts)[order][None], None


def _attend(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    readable: Tensor,
    scaling: float | None,
    softcap: float | None,
    sinks: Tensor | None,
) -> Tensor:
    """Return (rows, heads, tokens, head_dim); `readable` is bool (rows, 1, tokens, positions)."""
    if softcap is None and sinks is None:
        return scaled_dot_product_attention(
            query,
            keys,
            values,
            attn_mask=readable,
            scale=scaling,
            enable_gqa=query.shape[1] != keys.shape[1],
        )
    times = query.shape[1] // keys.shape[1]
    keys, values = (stored.repeat_interleave(times, 1) for stored in (keys, values))
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    scores = (query @ keys.transpose(-1, -2)).float() * scale
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores.masked_fill(~readable, -torch.inf)
    if sinks is not None:
        sink = sinks.float()[None, :, None, None].expand(*scores.shape[:-1], 1)
        scores = torch.cat((scores, sink), -1)
    shares = scores.softmax(-1)[..., : keys.shape[2]]
    return shares.to(values.dtype) @ values


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


# Layers of a pass ask for the same, those with a window and those without.
@lru_cache(maxsize=2)
def _groups(batch: Batch, window: int | None) -> tuple[list[_Group], Tensor]:
    """Return groups whose padding is at most half in either direction, and the tokens' places.

    Result [i] of the second is where token i comes in the groups' tokens, laid end to end.
    """
    device = batch.ids.device
    back = window or max(span.end for span in batch.spans)
    # What the first token of each span sees first.
    firsts = [max(span.start, span.position + 1 - back) for span in batch.spans]
    ends = list(accumulate((len(span.ids) for span in batch.spans), initial=0))
    sizes: dict[tuple[int, int], list[int]] = {}
    for i, span in enumerate(batch.spans):
        size = (len(span.ids).bit_length(), (span.end - firsts[i]).bit_length())
        sizes.setdefault(size, []).append(i)
    groups = []
    places = [0] * ends[-1]
    done = 0
    for members in sizes.values():
        spans = [batch.spans[i] for i in members]
        longest = max(len(span.ids) for span in spans)
        most = max(batch.spans[i].end - firsts[i] for i in members)
        tokens = [[min(ends[i] + at, ends[i + 1] - 1) for at in range(longest)] for i in members]
        positions = [
            [min(firsts[i] + at, batch.spans[i].end - 1) for at in range(most)] for i in members
        ]
        for row, i in enumerate(members):
            for at in range(len(batch.spans[i].ids)):
                places[ends[i] + at] = done + row * longest + at
        done += len(members) * longest
        of_tokens = torch.tensor(tokens, device=device)
        # Before the clamp above, so that what only fills a row up is not read twice.
        read = torch.tensor([[firsts[i]] for i in members]) + torch.arange(most)
        read = read.to(device)[:, None]
        written = batch.written[of_tokens][:, :, None]
        groups.append(
            _Group(
                of_tokens,
                torch.tensor([[span.slot] for span in spans], device=device),
                torch.tensor(positions, device=device),
                ((read <= written) & (read > written - back))[:, None],
            )
        )
    return groups, torch.tensor(places, device=device)


AttentionInterface.register(KERNEL, attend_by_kernel)
AttentionInterface.register(TORCH, attend_by_torch)

"""Torch's attention over the slots of a cache, against float64 arithmetic a token."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from superpose_server.model.attention import attend_by_torch
from superpose_server.model.batch import Batch, Span

SLOTS, HEADS, KEY_HEADS, ROOM, WIDTH = 4, 4, 2, 40, 8


@st.composite
def spans(draw: st.DrawFn) -> list[Span]:
    """Spans of different rows: each in a slot of its own, but for some behind each other in one."""
    found = []
    for slot in draw(st.lists(st.integers(0, SLOTS - 2), min_size=1, max_size=3, unique=True)):
        position = draw(st.integers(0, ROOM - 1))
        found.append(Span(slot, (0,) * draw(st.integers(1, ROOM - position)), position))
    start = 0
    for length in draw(st.lists(st.integers(1, 9), max_size=4)):
        found.append(Span(SLOTS - 1, (0,) * length, start, start))
        start += length
    return draw(st.permutations(found))


def exact(query: Tensor, keys: Tensor, values: Tensor, spans: list[Span], scale: float) -> Tensor:
    rows = []
    tokens = iter(query[0].double().transpose(0, 1))
    for span in spans:
        for end in range(span.position + 1, span.end + 1):
            q = next(tokens)
            k, v = (s[span.slot, :, span.start : end].double() for s in (keys, values))
            k, v = (s.repeat_interleave(HEADS // KEY_HEADS, 0) for s in (k, v))
            weights = (torch.einsum("hd,hpd->hp", q, k) * scale).softmax(-1)
            rows.append(torch.einsum("hp,hpd->hd", weights, v))
    return torch.stack(rows)[None]


@given(spans=spans(), seed=st.integers(0, 99))
def test_each_token_reads_its_own_row_up_to_itself(spans: list[Span], seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    count = sum(len(span.ids) for span in spans)
    query = torch.randn(1, HEADS, count, WIDTH, generator=generator)
    keys, values = (
        torch.randn(SLOTS, KEY_HEADS, ROOM, WIDTH, generator=generator) for _ in range(2)
    )
    batch = Batch.of(spans, torch.device("cpu"))
    found, _ = attend_by_torch(nn.Identity(), query, keys, values, None, batch=batch, scaling=0.3)
    assert found.shape == (1, count, HEADS, WIDTH)
    assert torch.allclose(found.double(), exact(query, keys, values, spans, 0.3), atol=1e-5)

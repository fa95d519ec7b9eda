"""Attention over the slots of a cache, torch's and the kernel's, against float64 a token."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.server.helpers import NEEDS_COMPILER
from torch import Tensor, nn

from superpose_server.model.attention import (
    UnknownAttention,
    attend_by_kernel,
    attend_by_torch,
    refuse_unknown,
)
from superpose_server.model.batch import Batch, Span
from superpose_server.model.kernels.build import load_kernels

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


@dataclass(frozen=True)
class Options:
    """What attention does to its scores beyond scaling."""

    window: int | None = None
    softcap: float | None = None
    sinks: Tensor | None = None


PLAIN = Options()


def exact(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    spans: list[Span],
    scale: float,
    options: Options = PLAIN,
) -> Tensor:
    rows = []
    tokens = iter(query[0].double().transpose(0, 1))
    for span in spans:
        for end in range(span.position + 1, span.end + 1):
            start = span.start if options.window is None else max(span.start, end - options.window)
            q = next(tokens)
            k, v = (s[span.slot, :, start:end].double() for s in (keys, values))
            k, v = (s.repeat_interleave(HEADS // KEY_HEADS, 0) for s in (k, v))
            scores = torch.einsum("hd,hpd->hp", q, k) * scale
            if options.softcap is not None:
                scores = options.softcap * (scores / options.softcap).tanh()
            shares = scores.exp()
            total = shares.sum(-1)
            if options.sinks is not None:
                total += options.sinks.double().exp()
            rows.append(torch.einsum("hp,hpd->hd", shares / total[:, None], v))
    return torch.stack(rows)[None]


def problem(spans: list[Span], seed: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Query, keys and values; what no token of the spans' slots may read is still finite."""
    generator = torch.Generator().manual_seed(seed)
    count = sum(len(span.ids) for span in spans)
    query = torch.randn(1, HEADS, count, WIDTH, generator=generator)
    keys, values = (
        torch.randn(SLOTS, KEY_HEADS, ROOM, WIDTH, generator=generator) for _ in range(2)
    )
    return query.to(dtype), keys.to(dtype), values.to(dtype)


Attend = Callable[..., tuple[Tensor, None]]


@pytest.fixture(
    scope="module",
    params=["torch", pytest.param("kernel", marks=NEEDS_COMPILER)],
)
def attend(request: pytest.FixtureRequest) -> Attend:
    if request.param == "torch":
        return attend_by_torch
    load_kernels()
    return attend_by_kernel


def module_of(window: int | None) -> nn.Module:
    module: Any = nn.Identity()
    if window is not None:
        module.superpose_window = window
    return module  # type: ignore[no-any-return]


@given(spans=spans(), seed=st.integers(0, 99))
def test_each_token_reads_its_own_row_up_to_itself(
    attend: Attend, spans: list[Span], seed: int
) -> None:
    query, keys, values = problem(spans, seed, torch.float32)
    batch = Batch.of(spans, torch.device("cpu"))
    found, _ = attend(nn.Identity(), query, keys, values, None, batch=batch, scaling=0.3)
    assert found.shape == (1, query.shape[2], HEADS, WIDTH)
    assert torch.allclose(found.double(), exact(query, keys, values, spans, 0.3), atol=1e-5)


@st.composite
def options(draw: st.DrawFn) -> Options:
    sinks = draw(st.none() | st.lists(st.floats(-4, 4, width=32), min_size=HEADS, max_size=HEADS))
    return Options(
        draw(st.none() | st.integers(1, ROOM + 3)),
        draw(st.none() | st.sampled_from([0.5, 2.0, 50.0])),
        None if sinks is None else torch.tensor(sinks),
    )


@settings(max_examples=40)
@given(spans=spans(), seed=st.integers(0, 99), options=options())
def test_windows_caps_and_sinks(
    attend: Attend, spans: list[Span], seed: int, options: Options
) -> None:
    query, keys, values = problem(spans, seed, torch.float32)
    found, _ = attend(
        module_of(options.window),
        *(query, keys, values, None),
        batch=Batch.of(spans, torch.device("cpu")),
        scaling=0.9,
        softcap=options.softcap,
        s_aux=options.sinks,
    )
    expected = exact(query, keys, values, spans, 0.9, options)
    assert torch.allclose(found.double(), expected, atol=2e-5)


@pytest.mark.parametrize("window", [1, 2, 5, 39, 40, 41])
def test_decoding_rows_of_different_lengths_with_a_window(attend: Attend, window: int) -> None:
    # In slots 0..n-1, which are a view, and in others.
    for slots in ((0, 1, 2), (2, 0, 3)):
        at = zip(slots, (39, 3, 0), strict=True)
        spans = [Span(slot, (0,), position) for slot, position in at]
        query, keys, values = problem(spans, 1, torch.float32)
        batch = Batch.of(spans, torch.device("cpu"))
        assert batch.decodes
        for options in (Options(window), Options(window, 2.0, torch.tensor([0.0, 1, -1, 3]))):
            found, _ = attend(
                *(module_of(window), query, keys, values, None),
                batch=batch,
                softcap=options.softcap,
                s_aux=options.sinks,
            )
            expected = exact(query, keys, values, spans, WIDTH**-0.5, options)
            assert torch.allclose(found.double(), expected, atol=1e-5)


def test_layers_with_and_without_a_window_take_turns_over_one_batch(attend: Attend) -> None:
    spans = [Span(0, (0,) * 9, 20), Span(1, (0,) * 30, 3), Span(2, (0,), 39)]
    query, keys, values = problem(spans, 2, torch.float32)
    batch = Batch.of(spans, torch.device("cpu"))
    for window in (None, 4, None, 7, 4, None):
        found, _ = attend(module_of(window), query, keys, values, None, batch=batch, scaling=0.5)
        expected = exact(query, keys, values, spans, 0.5, Options(window))
        assert torch.allclose(found.double(), expected, atol=1e-5)


def test_half_precision_is_that_of_its_numbers(attend: Attend) -> None:
    spans = [Span(0, (0,) * 9, 20), Span(1, (0,), 30)]
    query, keys, values = problem(spans, 3, torch.bfloat16)
    batch = Batch.of(spans, torch.device("cpu"))
    options = Options(6, 2.0, torch.tensor([0.0, 1, -1, 3], dtype=torch.bfloat16))
    found, _ = attend(
        *(module_of(6), query, keys, values, None),
        batch=batch,
        scaling=0.5,
        softcap=2.0,
        s_aux=options.sinks,
    )
    assert found.dtype == torch.bfloat16
    expected = exact(query, keys, values, spans, 0.5, options)
    assert torch.allclose(found.double(), expected, atol=0.02)


def test_what_attention_does_not_know_is_refused(attend: Attend) -> None:
    spans = [Span(0, (0,) * 3, 0)]
    query, keys, values = problem(spans, 0, torch.float32)
    batch = Batch.of(spans, torch.device("cpu"))

    def attended(mask: Any = None, **arguments: Any) -> Tensor:
        found, _ = attend(
            nn.Identity(), query, keys, values, mask, batch=batch, scaling=0.3, **arguments
        )
        return found

    plain = attended()
    for mask in (torch.zeros(1, 1, 3, 3), torch.ones(1, 3, dtype=torch.bool), True):
        with pytest.raises(UnknownAttention, match="takes a mask of its own"):
            attended(mask)
    for arguments in (
        {"position_bias": torch.zeros(1)},
        {"alibi": 0.0},
        {"cu_seq_lens_q": 0},
        {"is_causal": False},
        {"some_switch": True},
    ):
        with pytest.raises(UnknownAttention, match=f"takes {next(iter(arguments))}, which is not"):
            attended(**arguments)
    harmless = {"position_bias": None, "output_attentions": False, "is_causal": None}
    effectless = {"dropout": 0.1, "sliding_window": 1, "position_ids": plain, "use_cache": True}
    assert torch.equal(attended(**harmless), plain)
    assert torch.equal(attended(**effectless), plain)
    assert torch.equal(attended(is_causal=True, softcap=None, s_aux=None), plain)


def test_several_refusals_name_the_first() -> None:
    with pytest.raises(UnknownAttention, match="mask"):
        refuse_unknown(torch.zeros(1), {"alibi": torch.zeros(1)})
    refuse_unknown(None, {})

"""The likeliest tokens against a stable sort of everything."""

from __future__ import annotations

import pytest
import torch

from superpose_server.engine.blocks import block_maxima, likeliest_token, likeliest_tokens


@pytest.mark.parametrize("vocabulary", [1, 7, 64, 65, 640, 5003])
@pytest.mark.parametrize("count", [1, 5, 100, 100000])
def test_the_likeliest_tokens_are_those_of_a_stable_sort(vocabulary: int, count: int) -> None:
    generator = torch.Generator().manual_seed(vocabulary)
    # Few different values, so that most are equal to others; both zeros; -inf, and all -inf.
    logits = torch.randint(-3, 4, (6, vocabulary), generator=generator).float() / 2
    logits[1] *= -0.0
    logits[2, ::2] = -torch.inf
    logits[3] = torch.randn(vocabulary, generator=generator) * 1e30
    logits[4] = -torch.inf
    exact = logits.sort(dim=-1, descending=True, stable=True).indices
    maxima = block_maxima(logits)
    count = min(count, vocabulary)
    assert torch.equal(likeliest_tokens(logits, maxima, count), exact[:, :count])
    assert torch.equal(likeliest_token(logits, maxima), exact[:, 0])


def test_a_nan_is_the_largest_of_its_block() -> None:
    logits = torch.zeros(2, 130)
    logits[1, 129] = torch.nan
    assert block_maxima(logits).isnan().tolist() == [[False] * 3, [False, False, True]]

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from tests.makers import VOCABULARY, tiny_gpt2, tiny_tokenizer

from superpose_adapters.scoring import (
    EncodedText,
    Loss,
    Scope,
    loss_of,
    token_log_probabilities,
)
from superpose_adapters.text_encoder import TextEncoder


def test_refusals() -> None:
    with pytest.raises(ValueError, match="plain text"):
        EncodedText((1, 2)).first_scored("answer")
    scope: Any = "some"
    with pytest.raises(ValueError, match="'some'"):
        EncodedText((1, 2), 1).first_scored(scope)
    with pytest.raises(ValueError, match="nothing to score"):
        _ = Loss().mean


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_log_probabilities_against_float64(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    logits = (8 * torch.randn(3, 7, 50, generator=generator)).to(dtype)
    ids = torch.randint(50, (3, 7), generator=generator)
    wide = logits.double().numpy()
    reference = wide - np.log(np.exp(wide).sum(-1, keepdims=True))
    expected = np.take_along_axis(reference[:, :-1], ids[:, 1:, None].numpy(), -1)[..., 0]
    result = token_log_probabilities(logits, ids)
    assert result.dtype == torch.float32
    np.testing.assert_allclose(result.numpy(), expected, rtol=2e-6, atol=2e-6)


def test_huge_logits_stay_finite() -> None:
    logits = torch.tensor([[1e4, -1e4], [0.0, 0.0]])
    assert token_log_probabilities(logits, torch.tensor([0, 1])).tolist() == [-2e4]
    assert token_log_probabilities(logits, torch.tensor([1, 0])).tolist() == [0.0]


def test_loss_is_transformers_own() -> None:
    model = tiny_gpt2()
    encoder = TextEncoder(tiny_tokenizer(), VOCABULARY)
    encoded = encoder.row("How many?", "Two or three.", 64)
    ids = torch.tensor([encoded.ids])
    with torch.no_grad():
        output = model(input_ids=ids, labels=ids)
    log_probabilities = token_log_probabilities(output.logits, ids)[0]
    loss = loss_of(log_probabilities, encoded, "all")
    assert loss.tokens == len(encoded.ids) - 1
    assert loss.mean == pytest.approx(output.loss.item(), rel=1e-6)
    assert loss.perplexity == pytest.approx(math.exp(output.loss.item()), rel=1e-5)

    labels = ids.clone()
    labels[0, : encoded.answer_start] = -100
    with torch.no_grad():
        answer = model(input_ids=ids, labels=labels).loss.item()
    scored = loss_of(log_probabilities, encoded, "answer")
    assert scored.tokens == len(" Two or three.") + 1
    assert scored.mean == pytest.approx(answer, rel=1e-6)


@pytest.mark.parametrize(
    ("encoded", "scope", "tokens"),
    [
        (EncodedText((5, 6, 7, 8), 2), "all", 3),
        (EncodedText((5, 6, 7, 8), 2), "answer", 2),
        (EncodedText((5, 6, 7, 8), 4), "answer", 0),
        (EncodedText((5, 6, 7, 8), 9), "answer", 0),
        (EncodedText((5, 6), 0), "answer", 1),
        (EncodedText((5,)), "all", 0),
        (EncodedText(()), "all", 0),
    ],
)
def test_scored_tokens(encoded: EncodedText, scope: Scope, tokens: int) -> None:
    padded = torch.tensor([-1.0, -2.0, -4.0, -100.0])
    loss = loss_of(padded, encoded, scope)
    last = len(encoded.ids) - 1
    expected = -sum(padded[last - tokens : last].tolist()) if tokens else 0.0
    assert loss == Loss(expected, tokens)


def test_losses_add_by_tokens() -> None:
    total = Loss(6.0, 3) + Loss(1.0, 1)
    assert total.mean == 7 / 4  # not the mean of the means, 1.5
    assert total.perplexity == pytest.approx(math.exp(1.75))
    assert Loss(1e6, 1).perplexity == math.inf

"""Penalties and bias against transformers' processors and plain arithmetic."""

from __future__ import annotations

import random
from collections import Counter

import pytest
import torch
from transformers.generation.logits_process import RepetitionPenaltyLogitsProcessor

from superpose_server.engine.penalties import adjusted
from superpose_server.engine.sampling import SamplingParams

VOCABULARY = 40
NOTHING: frozenset[int] = frozenset()


def logits_of(rows: int) -> torch.Tensor:
    return 3 * torch.randn(rows, VOCABULARY, generator=torch.Generator().manual_seed(0))


def adjust(
    params: SamplingParams, prompt: list[int], answer: list[int], logits: torch.Tensor
) -> torch.Tensor:
    """The logits of a row that is alone, after an answer that came token by token."""
    history = params.history(prompt)
    for token in answer:
        if history is not None:
            history.append(token)
    return adjusted(logits[None], [history], [params.logit_bias], [NOTHING])[0]


@pytest.mark.parametrize("penalty", [1.3, 0.7, 100.0, 0.01])
def test_repetition_penalty_is_that_of_transformers(penalty: float) -> None:
    (logits,) = logits_of(1)
    prompt, answer = [3, 3, 5, 39, 0], [7, 5, 7, 7]
    processor = RepetitionPenaltyLogitsProcessor(penalty)
    exact = processor(torch.tensor([prompt + answer]), logits[None].clone())[0]
    params = SamplingParams(repetition_penalty=penalty)
    assert torch.equal(adjust(params, prompt, answer, logits), exact)
    assert not torch.equal(exact, logits)


@pytest.mark.parametrize(("frequency", "presence"), [(0.5, 0.0), (0.0, 1.5), (-2.0, 0.25)])
def test_frequency_and_presence_count_the_answer_alone(frequency: float, presence: float) -> None:
    (logits,) = logits_of(1)
    prompt, answer = [1, 2, 2, 8], [2, 9, 9, 9]
    exact = logits.double()
    for token, count in Counter(answer).items():
        exact[token] -= count * frequency + presence
    params = SamplingParams(frequency_penalty=frequency, presence_penalty=presence)
    found = adjust(params, prompt, answer, logits).double()
    torch.testing.assert_close(found, exact, rtol=0, atol=1e-6)
    assert torch.equal(adjust(params, prompt, [], logits), logits)


def test_repetition_comes_first_then_the_others_then_bias_and_what_is_forbidden() -> None:
    (logits,) = logits_of(1)
    prompt, answer = [1, 2], [2, 4, 4]
    bias = {4: 5.0, 6: -3.0, 9: 100.0, VOCABULARY + 2: 9.0}
    params = SamplingParams(
        repetition_penalty=1.5, frequency_penalty=0.5, presence_penalty=0.25, logit_bias=bias
    )
    exact = logits.double()
    for token in {1, 2, 4}:
        exact[token] = exact[token] / 1.5 if exact[token] > 0 else exact[token] * 1.5
    for token, count in Counter(answer).items():
        exact[token] -= count * 0.5 + 0.25
    for token in (4, 6, 9):
        exact[token] += bias[token]
    exact[9] = -torch.inf
    history = params.history(prompt)
    assert history is not None
    for token in answer:
        history.append(token)
    found = adjusted(logits[None], [history], [bias], [frozenset({9, VOCABULARY + 1})])[0]
    torch.testing.assert_close(found.double(), exact, rtol=0, atol=1e-5)


def test_a_row_is_changed_by_its_own_text_alone_and_the_logits_stay() -> None:
    draw = random.Random(1)
    logits = logits_of(6)
    kept = logits.clone()
    rows = []
    for row in range(6):
        params = SamplingParams(
            repetition_penalty=1.0 + row % 2,
            frequency_penalty=0.5 * (row % 3),
            logit_bias={row: 1.0} if row % 3 == 1 else {},
        )
        texts = [[draw.randrange(VOCABULARY) for _ in range(12)] for _ in range(2)]
        history = params.history(texts[0])
        for token in texts[1]:
            if history is not None:
                history.append(token)
        alone = adjust(params, texts[0], texts[1], logits[row])
        rows.append((params, history, alone))
    found = adjusted(
        logits, [row[1] for row in rows], [row[0].logit_bias for row in rows], [NOTHING] * 6
    )
    assert torch.equal(found, torch.stack([row[2] for row in rows]))
    assert torch.equal(logits, kept)
    assert rows[0][1] is None
    assert torch.equal(found[0], logits[0])


def test_without_any_of_them_nothing_is_copied() -> None:
    params = SamplingParams()
    assert params.history([1, 2, 3]) is None
    logits = logits_of(2)
    assert adjusted(logits, [None, None], [params.logit_bias] * 2, [NOTHING] * 2) is logits

"""Penalties, bias and the likeliest tokens through a socket, against transformers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tests.integration.harness import Family, Served

from superpose_client import GenerateOptions

IDS = [72, 101, 108, 108, 111, 32, 101]


def test_repetition_penalty_gives_the_text_of_transformers(served: Served, gpt2: Family) -> None:
    model: Any = gpt2.model
    with torch.inference_mode():
        expected = model.generate(
            torch.tensor([IDS]),
            attention_mask=torch.ones(1, len(IDS)),
            max_new_tokens=24,
            do_sample=False,
            repetition_penalty=1.4,
            eos_token_id=None,
            pad_token_id=0,
        )
    options: GenerateOptions = {"max_new_tokens": 24, "temperature": 0, "ignore_eos": True}
    penalised: GenerateOptions = {**options, "repetition_penalty": 1.4}
    found = served.client.generate(IDS, mix="base", **penalised)
    assert [*IDS, *found.token_ids] == expected[0].tolist()
    assert found.token_ids != served.client.generate(IDS, mix="base", **options).token_ids


def test_logprobs_are_those_of_the_model_whatever_changes_the_choice(
    served: Served, gpt2: Family
) -> None:
    found = served.client.generate(
        IDS,
        mix="base",
        max_new_tokens=6,
        temperature=0,
        ignore_eos=True,
        logit_bias={9: 100.0},
        presence_penalty=2.0,
        logprobs=True,
        top_logprobs=3,
    )
    assert found.token_ids == (9,) * 6
    with torch.inference_mode():
        logits = gpt2.model(torch.tensor([[*IDS, *found.token_ids]])).logits[0]
    exact = logits[len(IDS) - 1 : -1].log_softmax(-1)
    assert found.logprobs == pytest.approx(exact[:, 9].tolist(), abs=2e-4)
    values, ids = exact.topk(3)
    assert [list(top.token_ids) for top in found.top_logprobs] == ids.tolist()
    for top, value in zip(found.top_logprobs, values.tolist(), strict=True):
        assert top.logprobs == pytest.approx(value, abs=2e-4)


def test_a_stream_has_the_likeliest_tokens_of_each_place(served: Served) -> None:
    options: GenerateOptions = {
        "max_new_tokens": 5,
        "seed": 3,
        "ignore_eos": True,
        "top_logprobs": 20,
    }
    whole = served.client.generate(IDS, **options)
    chunks = list(served.client.stream(IDS, **options))
    assert tuple(top for chunk in chunks for top in chunk.top_logprobs) == whole.top_logprobs
    assert [len(top.token_ids) for top in whole.top_logprobs] == [20] * 5
    assert whole.logprobs == ()

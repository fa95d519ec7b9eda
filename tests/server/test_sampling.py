from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from tests.server.helpers import SAMPLING_KINDS
from transformers.generation.logits_process import (
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from superpose_server.engine.choosing import choose
from superpose_server.engine.sampling import SamplingParams
from superpose_server.errors import InvalidArgument

LOGITS = torch.tensor([2.0, 1.0, 0.5, 0.0, -1.0, 2.0, -3.0, 0.25])
DRAWS = 4000
NOTHING: frozenset[int] = frozenset()


def draw(
    logits: torch.Tensor,
    params: SamplingParams,
    generator: random.Random,
    forbidden: frozenset[int] = NOTHING,
) -> int:
    """One token of a row that is alone."""
    (token,), (finite,) = choose(logits[None], [params], [generator], [forbidden], [None])
    assert finite
    return token


def draw_many(
    params: SamplingParams, draws: int = DRAWS, logits: torch.Tensor = LOGITS
) -> list[int]:
    """So many draws, at once, each from a generator of its own that follows from the seed."""
    seeds = params.generator()
    tokens, finite = choose(
        logits.repeat(draws, 1),
        [params] * draws,
        [random.Random(seeds.getrandbits(64)) for _ in range(draws)],
        [NOTHING] * draws,
        [None] * draws,
    )
    assert all(finite)
    return tokens


def plain_probabilities(
    logits: NDArray[np.float64], temperature: float, top_k: int, top_p: float, min_p: float
) -> NDArray[np.float64]:
    """Temperature, the top_k likeliest, those whose likelier ones have less than top_p, min_p."""
    scaled = np.exp((logits - logits.max()) / temperature)
    order = sorted(range(len(logits)), key=lambda i: (-logits[i], i))
    top = np.isin(np.arange(len(logits)), order[: top_k or None])
    probabilities = np.where(top, scaled, 0) / scaled[top].sum()
    likelier = np.array([probabilities[logits > each].sum() for each in logits])
    kept = top & ((likelier < top_p) | (top_p >= 1)) & (scaled >= min_p)
    result: NDArray[np.float64] = np.where(kept, probabilities, 0) / probabilities[kept].sum()
    return result


@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p", "min_p"),
    [
        (1.0, 0, 1.0, 0.0),
        (0.5, 0, 1.0, 0.0),
        (2.0, 0, 1.0, 0.0),
        (1.0, 3, 1.0, 0.0),
        (1.0, 0, 0.75, 0.0),
        (1.5, 5, 0.8, 0.0),
        (1.0, 0, 1.0, 0.2),
        (2.0, 0, 0.9, 0.3),
    ],
)
def test_draws_follow_the_distribution(
    temperature: float, top_k: int, top_p: float, min_p: float
) -> None:
    params = SamplingParams(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p, seed=11)
    counts = np.bincount(draw_many(params), minlength=len(LOGITS))
    exact = plain_probabilities(LOGITS.double().numpy(), temperature, top_k, top_p, min_p)
    expected = DRAWS * exact
    assert counts[expected == 0].sum() == 0
    likely = expected > 0
    chi_square = float(((counts - expected)[likely] ** 2 / expected[likely]).sum())
    # 99.9th percentile of chi-square with 7 degrees of freedom; fewer kept tokens have less.
    assert chi_square < 24.3


@given(
    logits=st.lists(st.integers(-40, 40), min_size=1, max_size=12),
    temperature=st.sampled_from([0.25, 1.0, 3.0]),
    top_k=st.integers(0, 14),
    top_p=st.sampled_from([1.0, 0.99, 0.9, 0.5, 0.1, 1e-6]),
    min_p=st.sampled_from([0.0, 1e-6, 0.05, 0.3, 1.0]),
    seed=st.integers(0, 2**64 - 1),
)
def test_only_tokens_of_the_plain_set_are_drawn(
    logits: list[int], temperature: float, top_k: int, top_p: float, min_p: float, seed: int
) -> None:
    values = torch.tensor(logits, dtype=torch.float32) / 8
    params = SamplingParams(
        temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p, seed=seed
    )
    plain = plain_probabilities(values.double().numpy(), temperature, top_k, top_p, min_p)
    assert set(draw_many(params, 20, values)) <= set(np.flatnonzero(plain).tolist())


@pytest.mark.parametrize(
    ("top_p", "kept"),
    [
        (5e-324, {0}),
        (0.49999, {0}),
        (0.50001, {0, 1}),
        (0.74999, {0, 1}),
        (0.75001, {0, 1, 2, 3}),  # Equals stay together.
        (1.0, {0, 1, 2, 3, 4}),
    ],
)
def test_top_p_keeps_what_its_likelier_ones_leave_below_it(top_p: float, kept: set[int]) -> None:
    logits = torch.log(torch.tensor([8.0, 4.0, 1.5, 1.5, 1.0]))
    assert set(draw_many(SamplingParams(top_p=top_p, seed=0), 300, logits)) == kept


@pytest.mark.parametrize(
    ("top_k", "kept"), [(1, {1}), (2, {1, 70}), (3, {1, 70, 71}), (4, {0, 1, 70, 71})]
)
def test_of_equals_at_the_end_of_top_k_the_lower_ids_are_kept(top_k: int, kept: set[int]) -> None:
    logits = torch.full((200,), -5.0)
    logits[[0, 1, 70, 71, 150]] = torch.tensor([0.0, 2.0, 1.0, 1.0, -0.0])
    assert set(draw_many(SamplingParams(top_k=top_k, seed=0), 300, logits)) == kept


def test_temperature_zero_takes_the_first_of_the_likeliest() -> None:
    params = SamplingParams(temperature=0.0, seed=1)
    generator = params.generator()
    before = generator.getstate()
    assert draw(LOGITS, params, generator) == 0  # tokens 0 and 5 are equal
    assert generator.getstate() == before  # nothing was drawn


@pytest.mark.parametrize("temperature", [1e-3, 1e-30, 1e-50, 1e-300, 5e-324])
def test_a_tiny_temperature_is_greedy_and_no_error(temperature: float) -> None:
    logits = torch.tensor([0.0, 3.0, 2.9, -8.0])
    assert set(draw_many(SamplingParams(temperature=temperature, seed=0), 20, logits)) == {1}


def test_a_token_without_probability_is_never_drawn() -> None:
    logits = LOGITS.clone()
    logits[[0, 5]] = -torch.inf
    drawn = set(draw_many(SamplingParams(temperature=100.0, seed=0), 500, logits))
    assert drawn == {1, 2, 3, 4, 6, 7}


@pytest.mark.parametrize("top_k", [0, 7])
def test_a_forbidden_token_is_never_drawn(top_k: int) -> None:
    params = SamplingParams(temperature=100.0, top_k=top_k, seed=0)
    generator, forbidden = params.generator(), frozenset({0, 5})
    drawn = {draw(LOGITS, params, generator, forbidden) for _ in range(500)}
    assert drawn == {1, 2, 3, 4, 6, 7}


def test_a_token_is_forbidden_to_its_own_row_only_and_logits_stay_as_they_are() -> None:
    greedy = SamplingParams(temperature=0.0)
    logits = LOGITS.repeat(3, 1)
    tokens, finite = choose(
        logits,
        [greedy] * 3,
        [greedy.generator() for _ in range(3)],
        [NOTHING, frozenset({0, 5}), frozenset({0})],
        [None] * 3,
    )
    assert tokens == [0, 1, 5]
    assert finite == [True] * 3
    assert torch.equal(logits, LOGITS.repeat(3, 1))  # log-probabilities are taken from them


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(temperature=0.0),
        SamplingParams(seed=1),
        SamplingParams(seed=1, top_k=3),
        SamplingParams(seed=1, top_p=0.5, min_p=0.3),
    ],
    ids=["greedy", "drawn", "top_k", "top_p"],
)
def test_a_row_that_is_not_finite_is_named_and_harms_no_other(
    bad: float, params: SamplingParams
) -> None:
    alone = draw(LOGITS, params, params.generator())
    logits = LOGITS.repeat(4, 1)
    logits[0, 3] = bad
    logits[2] = -torch.inf
    logits[3, 1:] = -torch.inf  # one token is left
    for limit in (NOTHING, frozenset({7})):
        tokens, finite = choose(
            logits,
            [params] * 4,
            [params.generator() for _ in range(4)],
            [limit, NOTHING, limit, NOTHING],
            [None] * 4,
        )
        assert finite == [False, True, False, True]
        assert (tokens[1], tokens[3]) == (alone, 0)


@pytest.mark.parametrize("vocabulary", [50257, 8192, 300])
def test_a_row_gets_the_same_tokens_alone_and_among_others(vocabulary: int) -> None:
    kinds = [*SAMPLING_KINDS.values()] * 3
    generator = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(len(kinds), vocabulary, generator=generator)

    def tokens(rows: list[int]) -> list[int]:
        found, finite = choose(
            logits[rows],
            [kinds[row] for row in rows],
            [random.Random(row) for row in rows],
            [NOTHING] * len(rows),
            [None] * len(rows),
        )
        assert all(finite)
        return found

    everyone = list(range(len(kinds)))
    together = tokens(everyone)
    assert tokens(everyone[::-1]) == together[::-1]
    assert [tokens([row])[0] for row in everyone] == together
    assert tokens(everyone[5:17]) == together[5:17]


@pytest.mark.parametrize("kind", SAMPLING_KINDS)
@pytest.mark.parametrize("spread", [1.0, 4.0])
def test_large_vocabularies_are_drawn_from_as_in_float64(kind: str, spread: float) -> None:
    vocabulary, draws = 2000, 2000
    generator = torch.Generator().manual_seed(1)
    # As bfloat16 has them, so that many are equal.
    logits = spread * torch.randn(vocabulary, generator=generator).bfloat16().float()
    params = dataclasses.replace(SAMPLING_KINDS[kind], seed=3)
    exact = plain_probabilities(
        logits.double().numpy(),
        params.temperature or 1e-9,
        params.top_k,
        params.top_p,
        params.min_p,
    )
    counts = np.bincount(draw_many(params, draws, logits), minlength=vocabulary)
    assert counts[exact == 0].sum() == 0
    # Tokens in the order of their probability, in bins of equal probability.
    order = np.argsort(-exact, kind="stable")
    bins = np.minimum((exact[order].cumsum() * 20).astype(int), 19)
    expected = np.bincount(bins, exact[order], 20) * counts.sum()
    found = np.bincount(bins, counts[order], 20)
    full = expected > 0
    chi_square = float(((found - expected)[full] ** 2 / expected[full]).sum())
    assert chi_square < 43.8  # 99.9th percentile with 19 degrees of freedom.


@pytest.mark.parametrize("top_k", [0, 7, 40])
@pytest.mark.parametrize("top_p", [1.0, 0.9, 0.4])
@pytest.mark.parametrize("min_p", [0.0, 0.1])
def test_what_is_kept_is_what_transformers_keeps(top_k: int, top_p: float, min_p: float) -> None:
    logits = 2 * torch.randn(1, 100, generator=torch.Generator().manual_seed(2))
    warped = TemperatureLogitsWarper(1.5)(None, logits)
    if top_k:
        warped = TopKLogitsWarper(top_k)(None, warped)
    if top_p < 1:
        warped = TopPLogitsWarper(top_p)(None, warped)
    if min_p:
        warped = MinPLogitsWarper(min_p)(None, warped)
    exact = warped.double().softmax(-1)[0]
    params = SamplingParams(temperature=1.5, top_k=top_k, top_p=top_p, min_p=min_p, seed=4)
    counts = torch.bincount(torch.tensor(draw_many(params, DRAWS, logits[0])), minlength=100)
    assert counts[exact == 0].sum() == 0
    likely = exact > 20 / DRAWS
    deviation = (counts - DRAWS * exact)[likely] / (DRAWS * exact * (1 - exact)).sqrt()[likely]
    assert deviation.abs().max() < 4.5


@pytest.mark.parametrize("seed", [0, 1, 2**63 - 1, 2**63, 2**64 - 1])
def test_every_seed_of_64_bits_repeats(seed: int) -> None:
    params = SamplingParams(seed=seed)
    assert draw_many(params, 20) == draw_many(params, 20)


def test_seeds_differ_and_no_seed_is_a_new_one_each_time() -> None:
    runs = [tuple(draw_many(SamplingParams(seed=s), 40)) for s in (0, 1, 2, None, None)]
    assert len(set(runs)) == len(runs)


BAD: list[tuple[str, Callable[[], SamplingParams]]] = [
    ("max_new_tokens", lambda: SamplingParams(max_new_tokens=0)),
    ("max_new_tokens", lambda: SamplingParams(max_new_tokens=-1)),
    ("min_new_tokens", lambda: SamplingParams(min_new_tokens=-1)),
    ("min_new_tokens", lambda: SamplingParams(max_new_tokens=3, min_new_tokens=4)),
    ("temperature", lambda: SamplingParams(temperature=-0.1)),
    ("temperature", lambda: SamplingParams(temperature=100.1)),
    ("temperature", lambda: SamplingParams(temperature=float("nan"))),
    ("temperature", lambda: SamplingParams(temperature=float("inf"))),
    ("top_p", lambda: SamplingParams(top_p=0.0)),
    ("top_p", lambda: SamplingParams(top_p=1.01)),
    ("top_p", lambda: SamplingParams(top_p=-1.0)),
    ("top_p", lambda: SamplingParams(top_p=float("nan"))),
    ("min_p", lambda: SamplingParams(min_p=-0.01)),
    ("min_p", lambda: SamplingParams(min_p=1.01)),
    ("min_p", lambda: SamplingParams(min_p=float("nan"))),
    ("stop", lambda: SamplingParams(stop=("a",) * 17)),
    ("stop", lambda: SamplingParams(stop=("",))),
    ("stop", lambda: SamplingParams(stop=("a" * 257,))),
    ("repetition_penalty", lambda: SamplingParams(repetition_penalty=0.0)),
    ("repetition_penalty", lambda: SamplingParams(repetition_penalty=float("nan"))),
    ("repetition_penalty", lambda: SamplingParams(repetition_penalty=101.0)),
    ("frequency_penalty", lambda: SamplingParams(frequency_penalty=2.1)),
    ("presence_penalty", lambda: SamplingParams(presence_penalty=-2.1)),
    ("presence_penalty", lambda: SamplingParams(presence_penalty=float("nan"))),
    ("logit_bias", lambda: SamplingParams(logit_bias={3: 100.5})),
    ("logit_bias", lambda: SamplingParams(logit_bias={3: float("nan")})),
    ("logit_bias", lambda: SamplingParams(logit_bias=dict.fromkeys(range(1025), 1.0))),
    ("top_logprobs", lambda: SamplingParams(top_logprobs=21)),
]


@pytest.mark.parametrize(("field", "make"), BAD, ids=[f"{f}-{i}" for i, (f, _) in enumerate(BAD)])
def test_a_bad_value_is_refused_by_the_name_of_its_field(
    field: str, make: Callable[[], SamplingParams]
) -> None:
    with pytest.raises(InvalidArgument, match=rf"^{field} is .*: use ") as caught:
        make()
    assert caught.value.field == field
    assert caught.value.reason == "INVALID_SAMPLING"


def test_every_bit_of_a_seed_counts() -> None:
    numbers = {SamplingParams(seed=1 << bit).generator().random() for bit in range(64)}
    assert len(numbers) == 64


def test_too_many_stop_tokens_are_refused() -> None:
    SamplingParams(stop_token_ids=tuple(range(64)))
    with pytest.raises(InvalidArgument, match="stop_token_ids is 65 ids"):
        SamplingParams(stop_token_ids=tuple(range(65)))

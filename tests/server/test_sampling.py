from __future__ import annotations

import random
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from superpose_server.engine.sampling import SamplingParams, sample
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
    (token,), (finite,) = sample(logits[None], [params], [generator], [forbidden])
    assert finite
    return token


def draw_many(
    params: SamplingParams, draws: int = DRAWS, logits: torch.Tensor = LOGITS
) -> list[int]:
    """So many draws of one row's generator."""
    generator = params.generator()
    return [draw(logits, params, generator) for _ in range(draws)]


def plain_probabilities(
    logits: NDArray[np.float64], temperature: float, top_k: int, top_p: float, min_p: float
) -> NDArray[np.float64]:
    """Temperature, the top_k likeliest, the fewest that sum to top_p, those of at least min_p."""
    scaled = np.exp((logits - logits.max()) / temperature)
    probabilities = scaled / scaled.sum()
    order = sorted(range(len(logits)), key=lambda i: (-probabilities[i], i))
    kept: list[int] = []
    for index in order[: top_k or None]:
        kept.append(index)
        if top_p < 1 and probabilities[kept].sum() >= top_p:
            break
    kept = [index for index in kept if scaled[index] >= min_p]
    result: NDArray[np.float64] = np.zeros_like(probabilities)
    result[kept] = probabilities[kept] / probabilities[kept].sum()
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
    [(0.5, {0}), (0.50001, {0, 1}), (0.75, {0, 1}), (0.76, {0, 1, 2}), (1.0, {0, 1, 2, 3})],
)
def test_top_p_keeps_the_fewest_tokens_that_sum_to_it(top_p: float, kept: set[int]) -> None:
    # Probabilities 1/2, 1/4, 1/8, 1/8, exact in floating point.
    logits = torch.log(torch.tensor([4.0, 2.0, 1.0, 1.0], dtype=torch.float64)).float()
    assert set(draw_many(SamplingParams(top_p=top_p, seed=0), 300, logits)) == kept


def test_top_p_is_compared_as_the_number_that_was_sent() -> None:
    # 0.6 in float32 is above 0.6: a third token would be kept that nobody asked for.
    probabilities = torch.tensor([0.3, 0.3, 0.2, 0.2], dtype=torch.float64)
    params = SamplingParams(top_p=0.6 - 1e-12, seed=0)
    assert set(draw_many(params, 300, probabilities.log())) == {0, 1}


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
    tokens, finite = sample(
        logits,
        [greedy] * 3,
        [greedy.generator() for _ in range(3)],
        [NOTHING, frozenset({0, 5}), frozenset({0})],
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
    ],
    ids=["greedy", "drawn", "filtered"],
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
        tokens, finite = sample(
            logits,
            [params] * 4,
            [params.generator() for _ in range(4)],
            [limit, NOTHING, limit, NOTHING],
        )
        assert finite == [False, True, False, True]
        assert (tokens[1], tokens[3]) == (alone, 0)


def test_numbers_do_not_depend_on_batch_neighbours() -> None:
    hot = SamplingParams(temperature=1.0, seed=5)
    alone = draw_many(hot, 50)
    others = [
        SamplingParams(temperature=0.0),
        SamplingParams(temperature=3.0, top_k=2, seed=6),
        SamplingParams(top_p=0.3, seed=5),
    ]
    for place in range(4):
        params = [*others[:place], hot, *others[place:]]
        generators = [p.generator() for p in params]
        batch = LOGITS.repeat(4, 1)
        drawn = [sample(batch, params, generators, [NOTHING] * 4)[0][place] for _ in range(50)]
        assert drawn == alone


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


def test_a_seed_gives_the_same_token_beside_rows_that_filter() -> None:
    plain, filtering = SamplingParams(seed=3), SamplingParams(seed=4, top_k=3)
    for seed in range(50):
        alone = draw(LOGITS, plain, random.Random(seed))
        beside, _ = sample(
            LOGITS.expand(2, -1),
            [filtering, plain],
            [random.Random(0), random.Random(seed)],
            [NOTHING] * 2,
        )
        assert beside[1] == alone

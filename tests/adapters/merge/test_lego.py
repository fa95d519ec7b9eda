"""LoRA-LEGO: the best clustering found by trying all, in numpy; and what holds for any."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.adapters.merge.dense import Matrix, decompose, plain_sum
from tests.adapters.merge.making import (
    deltas_of,
    distance,
    make_terms,
    merged_delta,
    weighted,
)

from superpose_adapters.merge.lego import Lego
from superpose_adapters.merge.methods import MethodError, read_method
from superpose_adapters.merge.term import Term

seeds = st.integers(0, 2**32 - 1)
rank_lists = st.lists(st.integers(1, 4), min_size=1, max_size=3)


def near_copies(seed: int, count: int = 3, rank: int = 2) -> list[Term]:
    """Adapters that differ by a fiftieth: each rank of one is near a rank of every other."""
    first = make_terms(seed, [rank])[0]
    # Singular values far apart, so that singular vectors of copies are near each other.
    a, b = first.a * torch.tensor([3.0, 1.0])[:, None], first.b
    generator = torch.Generator().manual_seed(seed)
    return [
        Term(
            i,
            a + torch.randn(a.shape, generator=generator).double() / 50,
            b + torch.randn(b.shape, generator=generator).double() / 50,
        )
        for i in range(count)
    ]


def units_of(delta: Matrix) -> list[Matrix]:
    u, s, vh = decompose(delta)
    units = []
    for i, v in enumerate(vh):
        sign = np.sign(v[np.argmax(np.abs(v))])
        units.append(np.sqrt(s[i]) * sign * np.concatenate([v, u[:, i]]))
    return units


def best_clusters(units: Sequence[Matrix], count: int) -> list[Matrix]:
    """The clusters of least squares, of all there are."""
    best, least = None, np.inf
    for labels in product(range(count), repeat=len(units)):
        clusters = [
            np.array([unit for unit, label in zip(units, labels, strict=True) if label == c])
            for c in range(count)
        ]
        if all(map(len, clusters)):
            spread = sum(((members - members.mean(0)) ** 2).sum() for members in clusters)
            if spread < least:
                best, least = clusters, spread
    assert best is not None
    return best


def by_definition(terms: Sequence[Term], count: int, *, reweight: bool) -> Matrix:
    units = [unit for delta in deltas_of(terms) for unit in units_of(delta)]
    inputs = terms[0].a.shape[1]
    total = np.zeros((terms[0].b.shape[0], inputs))
    for members in best_clusters(units, count):
        mean = members.mean(0)
        if reweight:
            mean = mean / np.linalg.norm(mean) * np.mean([np.linalg.norm(m) for m in members])
        total += np.outer(mean[inputs:], mean[:inputs])
    largest = max(term.rank for term in terms)
    return total * np.sqrt(largest / count) if reweight else total


@pytest.mark.parametrize("reweight", [True, False])
@pytest.mark.parametrize("weights", [(1.0, 1.0, 1.0), (1.0, 0.9, -1.0)])
@pytest.mark.parametrize("seed", [1, 2])
def test_clusters_that_lie_apart_are_found_and_averaged(
    *, reweight: bool, weights: tuple[float, ...], seed: int
) -> None:
    terms = weighted(near_copies(seed), weights)
    # A negative one has clusters of its own: their number is right, so there is one best answer.
    count = 2 if min(weights) > 0 else 4
    expected = by_definition(terms, count, reweight=reweight)
    found = merged_delta(Lego(rank=count, reweight=reweight), terms)
    assert distance(found, expected) < 1e-10


@settings(max_examples=15)
@given(seed=seeds, ranks=rank_lists, more=st.integers(0, 3))
def test_as_many_clusters_as_ranks_are_the_plain_sum(
    seed: int, ranks: list[int], more: int
) -> None:
    terms = weighted(make_terms(seed, ranks), [1.0, -0.5, 2.0][: len(ranks)])
    method = Lego(rank=sum(ranks) + more, reweight=False)
    assert distance(merged_delta(method, terms), plain_sum(deltas_of(terms))) < 1e-10


def test_equal_adapters_are_summed_where_there_is_room_and_averaged_where_not() -> None:
    first = make_terms(3, [3])[0]
    terms = [Term(i, first.a, first.b) for i in range(3)]
    delta = deltas_of(terms)[0]
    assert distance(merged_delta(Lego(rank=9, reweight=False), terms), 3 * delta) < 1e-10
    # 0: as many as the largest rank. Means are as long as what they are of, and k is r.
    for method in (Lego(), Lego(reweight=False)):
        assert distance(merged_delta(method, terms), delta) < 1e-10


def test_more_clusters_than_different_units_are_not_filled_up() -> None:
    first = make_terms(4, [2])[0]
    terms = [Term(i, first.a, first.b) for i in range(3)]
    a, b = Lego(rank=4, reweight=False).merge("x", 3, terms)
    assert len(a) == 2
    assert distance(b.numpy() @ a.numpy(), deltas_of(terms)[0]) < 1e-10


def test_units_of_one_delta_in_other_factors_are_one_unit() -> None:
    first = make_terms(4, [2])[0]
    gauge = torch.tensor([[3.0, 0.7], [-0.2, 1.1]]).double()
    second = Term(1, gauge @ first.a, first.b @ torch.linalg.inv(gauge))
    for seed in range(8):
        a, b = Lego(rank=3, seed=seed, reweight=False).merge("x", 2, [first, second])
        assert len(a) == 2
        assert distance(b.numpy() @ a.numpy(), deltas_of([first])[0]) < 1e-10


def test_an_adapter_and_its_negative_cancel_in_one_cluster() -> None:
    first = make_terms(5, [1])[0]
    terms = weighted([first, Term(1, first.a, first.b)], [1.0, -1.0])
    for reweight in (True, False):
        found = merged_delta(Lego(rank=1, reweight=reweight), terms)
        assert np.linalg.norm(found) < 1e-12


@settings(max_examples=15)
@given(seed=seeds, ranks=rank_lists, rank=st.integers(0, 5))
def test_gauge_changes_nothing_and_rank_is_kept(seed: int, ranks: list[int], rank: int) -> None:
    terms = make_terms(seed, ranks)
    others = []
    generator = torch.Generator().manual_seed(seed)
    for term in terms:
        gauge = torch.randn(term.rank, term.rank, generator=generator).double() / 2
        gauge -= 2 * torch.eye(term.rank)
        others.append(Term(term.part, gauge @ term.a, term.b @ torch.linalg.inv(gauge)))
    method = Lego(rank=rank)
    assert distance(merged_delta(method, others), merged_delta(method, terms)) < 1e-6
    assert len(method.merge("x", len(terms), terms)[0]) <= (rank or max(ranks))


def test_a_seed_gives_the_same_bits() -> None:
    terms = make_terms(6, [4, 4, 4])
    first, second = (Lego(seed=5).merge("x", 3, terms) for _ in range(2))
    torch.manual_seed(1)
    assert all(torch.equal(*pair) for pair in zip(first, second, strict=True))
    others = {float(Lego(seed=seed).merge("x", 3, terms)[1].norm()) for seed in range(8)}
    assert len(others) > 1


def test_nothing_of_nothing() -> None:
    term = make_terms(7, [2])[0]
    a, b = Lego().merge("x", 1, [Term(0, term.a, term.b * 0)])
    assert (a.shape, b.shape) == ((0, 11), (14, 0))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": -1}, "lego: rank is -1: use a rank, or 0 for the adapters' largest"),
        ({"iterations": 0}, "lego: iterations is 0: use 1 to 1000"),
        ({"seed": -1}, "lego: seed is -1: use 0 to 2**32 - 1"),
        ({"reweight": 1}, "lego: reweight is '1': use true or false"),
    ],
)
def test_options_out_of_range_are_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(MethodError) as caught:
        read_method("lego", options)
    assert str(caught.value) == message

"""Each way of merging against its definition on whole deltas, in numpy."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import numpy as np
import pytest
import torch
from tests.adapters.merge import dense
from tests.adapters.merge.dense import Matrix
from tests.adapters.merge.making import (
    MODULE,
    deltas_of,
    distance,
    make_terms,
    merged_delta,
    weighted,
)

from superpose_adapters.merge.cat import Cat
from superpose_adapters.merge.core_space import CoreSpace
from superpose_adapters.merge.dare import CoreDare
from superpose_adapters.merge.iso import CoreIso
from superpose_adapters.merge.knots_ties import KnotsTies
from superpose_adapters.merge.magnitude import CoreMagnitude
from superpose_adapters.merge.mean import Mean
from superpose_adapters.merge.method import Method
from superpose_adapters.merge.plain_sum import PlainSum
from superpose_adapters.merge.svd import TruncatedSvd
from superpose_adapters.merge.ties import CoreTies
from superpose_adapters.merge.tsv import CoreTsv

Definition = Callable[[Sequence[Matrix]], Matrix]


def pruned(deltas: Sequence[Matrix], density: float) -> Matrix:
    return dense.in_core(
        deltas, lambda cores: dense.plain_sum([dense.trimmed(core, density) for core in cores])
    )


def core_ties(deltas: Sequence[Matrix], density: float, join: str) -> Matrix:
    return dense.in_core(deltas, partial(dense.ties, density=density, join=join))


def knots_ties(deltas: Sequence[Matrix], density: float, join: str) -> Matrix:
    return dense.in_knots(deltas, partial(dense.ties, density=density, join=join))


CASES: list[tuple[Method, Definition]] = [
    (PlainSum(), dense.plain_sum),
    (Cat(), dense.plain_sum),
    (Mean(), lambda deltas: dense.plain_sum(deltas) / len(deltas)),
    (TruncatedSvd(), lambda deltas: dense.truncated(deltas, 4)),  # The largest of the ranks.
    (TruncatedSvd(rank=2), lambda deltas: dense.truncated(deltas, 2)),
    (TruncatedSvd(rank=99), dense.plain_sum),
    (CoreTsv(), dense.tsv),
    (CoreTsv(), lambda deltas: dense.in_core(deltas, dense.tsv)),
    (CoreIso(), dense.iso),
    (CoreIso(), lambda deltas: dense.in_core(deltas, dense.iso)),
    (CoreDare(density=1), dense.plain_sum),
    (CoreMagnitude(density=1), dense.plain_sum),
    (CoreMagnitude(density=0.3), partial(pruned, density=0.3)),
    (CoreTies(), partial(core_ties, density=0.2, join="mean")),
    (CoreTies(0.4, "sum"), partial(core_ties, density=0.4, join="sum")),
    (CoreTies(1.0), partial(core_ties, density=1.0, join="mean")),
    (KnotsTies(), partial(knots_ties, density=0.2, join="mean")),
    (KnotsTies(0.4, "sum"), partial(knots_ties, density=0.4, join="sum")),
    (KnotsTies(1.0), partial(knots_ties, density=1.0, join="mean")),
]
PARTS = {
    "three ranks": ([4, 2, 3], [1.0, 1.0, 1.0]),
    "weights": ([4, 2, 3], [0.5, -1.5, 2.0]),
    "all negative": ([3, 4], [-1.0, -0.25]),
    "one": ([4], [0.7]),
    "more ranks than inputs": ([4, 4, 4], [1.0, -0.5, 0.3]),
}


@pytest.mark.parametrize("parts", PARTS)
@pytest.mark.parametrize(
    ("method", "definition"), CASES, ids=[f"{i}-{m.name}" for i, (m, _) in enumerate(CASES)]
)
def test_a_method_is_its_definition(method: Method, definition: Definition, parts: str) -> None:
    ranks, weights = PARTS[parts]
    for seed in range(3):
        terms = weighted(make_terms(seed, ranks), weights)
        assert distance(merged_delta(method, terms), definition(deltas_of(terms))) < 1e-9


@pytest.mark.parametrize("parts", PARTS)
def test_a_core_space_loses_nothing(parts: str) -> None:
    ranks, weights = PARTS[parts]
    terms = weighted(make_terms(7, ranks), weights)
    space = CoreSpace.of(terms)
    left, right = space.left.numpy(), space.right.numpy()
    np.testing.assert_allclose(left.T @ left, np.eye(left.shape[1]), atol=1e-14)
    np.testing.assert_allclose(right @ right.T, np.eye(right.shape[0]), atol=1e-14)
    assert left.shape[1] == min(sum(ranks), 14)
    assert right.shape[0] == min(sum(ranks), 11)
    deltas = deltas_of(terms)
    for core, delta in zip(space.cores.numpy(), deltas, strict=True):
        assert distance(left @ core @ right, delta) < 1e-12
    # Of the sum in core space, which is task arithmetic there.
    assert distance(left @ space.cores.sum(0).numpy() @ right, dense.plain_sum(deltas)) < 1e-12


@pytest.mark.parametrize("method", [PlainSum(), Cat(), Mean(), CoreTies(1.0), KnotsTies(1.0)])
def test_one_adapter_whole_is_itself(method: Method) -> None:
    terms = make_terms(3, [4])
    assert distance(merged_delta(method, terms), deltas_of(terms)[0]) < 1e-12


def test_the_mean_counts_adapters_that_leave_a_module_alone() -> None:
    terms = make_terms(3, [4, 2])
    assert (
        distance(merged_delta(Mean(), terms, parts=5), dense.plain_sum(deltas_of(terms)) / 5)
        < 1e-12
    )


def test_dare_keeps_and_enlarges_entries_of_the_cores() -> None:
    terms = make_terms(5, [8], outputs=40, inputs=30)
    (delta,) = deltas_of(terms)
    left, right = dense.bases([delta])
    whole = left.T @ delta @ right  # Diagonal, since there is one.
    found = left.T @ merged_delta(CoreDare(density=0.25, seed=1), terms) @ right
    kept = np.isclose(np.diag(found), np.diag(whole) / 0.25)
    dropped = np.isclose(np.diag(found), 0, atol=1e-12)
    assert (kept | dropped).all()
    assert kept.any()
    assert dropped.any()


def test_dare_is_the_plain_sum_in_the_mean() -> None:
    terms = weighted(make_terms(5, [3, 2]), [1.0, -0.5])
    drawn = [merged_delta(CoreDare(density=0.4, seed=seed), terms) for seed in range(400)]
    whole = dense.plain_sum(deltas_of(terms))
    # An entry's own deviation is sqrt((1 - d) / d) of it, and 400 draws divide it by 20.
    assert distance(np.mean(drawn, axis=0), whole) < 0.2
    assert distance(drawn[0], whole) > 0.3


def test_dare_depends_on_its_seed_the_module_and_the_part_alone() -> None:
    method = CoreDare(density=0.5, seed=3)
    terms = make_terms(5, [3, 3])
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = merged_delta(method, terms)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    np.testing.assert_array_equal(merged_delta(method, terms), first)

    def differs(other: tuple[torch.Tensor, torch.Tensor]) -> bool:
        a, b = other
        return distance(b.numpy() @ a.numpy(), first) > 0.1

    assert differs(CoreDare(density=0.5, seed=4).merge(MODULE, 2, terms))
    assert differs(method.merge("transformer.h.1.attn.c_attn", 2, terms))
    moved = [type(term)(term.part + 1, term.a, term.b) for term in terms]
    assert differs(method.merge(MODULE, 3, moved))


@pytest.mark.parametrize("density", [0.2, 0.5])
def test_ties_in_core_space_is_another_thing_than_ties_of_whole_deltas(density: float) -> None:
    # At the shapes of an attention module of GPT-2 Small, a fourth as wide, of three adapters of
    # rank 4. docs/merging.md has the figures of trained ones.
    terms = make_terms(11, [4, 4, 4], outputs=576, inputs=192)
    deltas = deltas_of(terms)
    full = _fast_ties(np.stack(deltas), density)
    assert distance(_fast_ties(np.stack(deltas[:1]), 1.0), deltas[0]) < 1e-12
    for method in (CoreTies(density), KnotsTies(density)):
        assert 0.3 < distance(merged_delta(method, terms), full) < 1.2


def _fast_ties(deltas: Matrix, density: float) -> Matrix:
    """TIES of whole deltas (n, out, in), where entries are too many for a loop."""
    sizes = np.abs(deltas).reshape(len(deltas), -1)
    floor = np.quantile(sizes, 1 - density, axis=1) if density < 1 else np.zeros(len(deltas))
    kept = np.where(np.abs(deltas) >= floor[:, None, None], deltas, 0)
    winners = np.where(np.sign(kept) == np.sign(kept.sum(axis=0)), kept, 0)
    merged: Matrix = winners.sum(axis=0) / np.maximum((winners != 0).sum(axis=0), 1)
    return merged

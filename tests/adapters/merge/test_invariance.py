"""What a merge may not depend on: the factors of a delta, the order, zeros that are stated."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.adapters.merge.making import (
    distance,
    make_part,
    make_terms,
    merged_delta,
    weighted,
)

from superpose_adapters.fold import concatenate_factors
from superpose_adapters.merge.cat import Cat
from superpose_adapters.merge.dare import CoreDare
from superpose_adapters.merge.iso import CoreIso
from superpose_adapters.merge.knots_ties import KnotsTies
from superpose_adapters.merge.magnitude import CoreMagnitude
from superpose_adapters.merge.mean import Mean
from superpose_adapters.merge.merge import Part, merge
from superpose_adapters.merge.method import MergeError, Method
from superpose_adapters.merge.plain_sum import PlainSum
from superpose_adapters.merge.svd import TruncatedSvd
from superpose_adapters.merge.term import Term
from superpose_adapters.merge.ties import CoreTies
from superpose_adapters.merge.tsv import CoreTsv

METHODS: list[Method] = [
    PlainSum(),
    Mean(),
    Cat(),
    TruncatedSvd(rank=2),
    CoreTsv(),
    CoreIso(),
    CoreTies(0.3),
    CoreTies(0.7, "sum"),
    CoreDare(0.5),
    CoreMagnitude(0.4),
    KnotsTies(0.3),
]
each_method = pytest.mark.parametrize("method", METHODS, ids=lambda method: method.name)
seeds = st.integers(0, 2**32 - 1)
rank_lists = st.lists(st.integers(1, 4), min_size=1, max_size=3)
CLOSE = 1e-6  # Bases turn by rounding over the gap of singular values, which may be narrow.


@st.composite
def term_lists(draw: st.DrawFn) -> list[Term]:
    terms = make_terms(draw(seeds), draw(rank_lists))
    weights = [draw(st.sampled_from([1.0, 0.5, -1.0, 2.5, -0.3])) for _ in terms]
    return weighted(terms, weights)


def rewritten(term: Term, seed: int) -> Term:
    """The same delta, in factors that are as large as others and turned against each other."""
    generator = torch.Generator().manual_seed(seed)
    gauge = torch.randn(term.rank, term.rank, generator=generator, dtype=torch.float64)
    gauge += 3 * torch.eye(term.rank, dtype=torch.float64)
    gauge *= 10.0 ** (seed % 7 - 3) * (-1) ** seed
    return Term(
        term.part, gauge @ term.a, torch.linalg.solve(gauge, term.b, left=False), term.scale
    )


@each_method
@settings(max_examples=15)
@given(terms=term_lists(), seed=seeds)
def test_a_merge_depends_on_deltas_and_not_on_their_factors(
    method: Method, terms: list[Term], seed: int
) -> None:
    others = [rewritten(term, seed + term.part) for term in terms]
    assert distance(merged_delta(method, others), merged_delta(method, terms)) < CLOSE


@each_method
@settings(max_examples=15)
@given(terms=term_lists())
def test_a_rank_that_adds_nothing_changes_nothing(method: Method, terms: list[Term]) -> None:
    # Row i of A twice, half of column i of B for each; and a rank of which B is zero.
    def widened(term: Term) -> Term:
        a = torch.cat([term.a, term.a[:1], torch.ones_like(term.a[:1])])
        half = term.b[:, :1] / 2
        b = torch.cat([half, term.b[:, 1:], half, torch.zeros_like(half)], dim=1)
        return Term(term.part, a, b, term.scale)

    others = [widened(term) for term in terms]
    assert distance(merged_delta(method, others), merged_delta(method, terms)) < CLOSE


@pytest.mark.parametrize("method", [m for m in METHODS if not isinstance(m, CoreDare)])
@settings(max_examples=15)
@given(terms=term_lists())
def test_the_order_of_adapters_changes_nothing(method: Method, terms: list[Term]) -> None:
    turned = [Term(i, t.a, t.b, t.scale) for i, t in enumerate(reversed(terms))]
    assert distance(merged_delta(method, turned), merged_delta(method, terms)) < CLOSE


@each_method
@settings(max_examples=15)
@given(terms=term_lists(), factor=st.sampled_from([2.0, 0.37, -1.0, -4.0]))
def test_a_common_factor_of_the_weights_is_one_of_the_result(
    method: Method, terms: list[Term], factor: float
) -> None:
    whole = merged_delta(method, terms)
    scaled = [Term(t.part, t.a, t.b * factor, t.scale * factor) for t in terms]
    assert distance(merged_delta(method, scaled), factor * whole) < CLOSE


@each_method
@settings(max_examples=15)
@given(terms=term_lists())
def test_a_zero_is_as_good_as_no_adapter(method: Method, terms: list[Term]) -> None:
    nothing = Term(len(terms), torch.ones(2, 11).double(), torch.zeros(14, 2).double())
    stated = merged_delta(method, [*terms, nothing])
    assert distance(stated, merged_delta(method, terms, parts=len(terms) + 1)) < CLOSE


# Adapters, as merge() sees them.


def some_parts(seed: int, weights: Sequence[float] = (1.0, -0.5, 0.3)) -> list[Part]:
    """Three adapters of other ranks and scalings, on modules that they share in part."""
    first, second, third = (make_terms(seed + i, [4, 2, 3]) for i in range(3))
    return [
        make_part("law", {"x": (first[0].a, first[0].b)}, weights[0], scaling=2.0),
        make_part(
            "math", {m: (t.a, t.b) for m, t in zip("xyz", second, strict=True)}, weights[1], 0.5
        ),
        make_part("art", {m: (t.a, t.b) for m, t in zip("yz", third[1:], strict=True)}, weights[2]),
    ]


@each_method
def test_adapters_given_in_another_order_merge_to_the_same_bits(method: Method) -> None:
    parts = some_parts(1)
    merged = merge(parts, method)
    assert list(merged) == ["x", "y", "z"]
    for order in ([1, 2, 0], [2, 1, 0]):
        again = merge([parts[i] for i in order], method)
        assert list(again) == list(merged)
        for module, (a, b) in merged.items():
            assert a.dtype == b.dtype == torch.float32
            assert torch.equal(again[module][0], a)
            assert torch.equal(again[module][1], b)


@each_method
def test_weights_and_scaling_are_one_factor_of_the_delta(method: Method) -> None:
    parts = some_parts(2)
    plain = [
        make_part(
            part.domain,
            {m: (f.a, f.b * f.scaling * part.weight) for m, f in part.adapter.modules.items()},
        )
        for part in parts
    ]
    merged, expected = merge(parts, method), merge(plain, method)
    for module, (a, b) in merged.items():
        found = b.numpy() @ a.numpy()
        assert distance(found, expected[module][1].numpy() @ expected[module][0].numpy()) < 1e-5


def test_the_sum_has_the_factors_of_a_fold_to_the_bit() -> None:
    parts = sorted(some_parts(3), key=lambda part: part.adapter.digest)
    merged = merge(parts, PlainSum())
    for module, (a, b) in merged.items():
        folded = concatenate_factors({part.adapter: part.weight for part in parts}, module)
        assert folded is not None
        assert torch.equal(folded[0], a)
        assert torch.equal(folded[1], b)


@each_method
def test_a_scale_of_zero_leaves_nothing(method: Method) -> None:
    term = make_terms(1, [2])[0]
    part = make_part("law", {"x": (term.a, term.b)}, scaling=0.0)
    assert merge([part], method) == {}


def test_adapters_of_two_bases_are_refused() -> None:
    narrow, wide = make_terms(1, [2])[0], make_terms(1, [2], inputs=12)[0]
    parts = [
        make_part("law", {"x": (narrow.a, narrow.b)}),
        make_part("math", {"x": (wide.a, wide.b)}),
    ]
    with pytest.raises(MergeError) as caught:
        merge(parts, PlainSum())
    message = "x is 14 x 11 in law and 14 x 12 in math: merge adapters of one base"
    assert str(caught.value) == message


def test_what_is_beyond_float32_is_refused() -> None:
    term = make_terms(1, [2])[0]
    part = make_part("law", {"x": (term.a, term.b * 1e36)}, weight=1e4)
    with pytest.raises(
        MergeError, match=r"^x: what is merged is beyond float32: use smaller weights$"
    ):
        merge([part], PlainSum())

"""Deltas that are zero, alike, of lower rank than they look, or that cancel."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from tests.adapters.merge.dense import Matrix
from tests.adapters.merge.making import deltas_of, distance, make_part, make_terms, merged_delta

from superpose_adapters.merge.cat import Cat
from superpose_adapters.merge.dare import CoreDare
from superpose_adapters.merge.deviation import deviation
from superpose_adapters.merge.iso import CoreIso
from superpose_adapters.merge.knots_ties import KnotsTies
from superpose_adapters.merge.magnitude import CoreMagnitude
from superpose_adapters.merge.mean import Mean
from superpose_adapters.merge.merge import merge
from superpose_adapters.merge.method import Method
from superpose_adapters.merge.methods import METHODS
from superpose_adapters.merge.plain_sum import PlainSum
from superpose_adapters.merge.svd import TruncatedSvd
from superpose_adapters.merge.term import Term
from superpose_adapters.merge.ties import CoreTies
from superpose_adapters.merge.tsv import CoreTsv

# Methods that look at deltas: those that concatenate factors keep what cancels.
LOOKING: list[Method] = [
    TruncatedSvd(),
    CoreTsv(),
    CoreIso(),
    CoreTies(1.0),
    CoreTies(0.2, "sum"),
    CoreMagnitude(0.3),
    KnotsTies(1.0),
    KnotsTies(0.2),
]


@pytest.mark.parametrize("name", METHODS)
def test_of_zeros_nothing_is_left(name: str) -> None:
    zero = Term(0, torch.ones(3, 11).double(), torch.zeros(14, 3).double())
    terms = [zero, Term(1, zero.a[:1], zero.b[:, :1])]
    for given in (terms[:1], terms):
        np.testing.assert_array_equal(merged_delta(METHODS[name](), given), np.zeros((14, 11)))


@pytest.mark.parametrize("method", LOOKING, ids=lambda method: method.name)
def test_of_deltas_that_cancel_nothing_is_left(method: Method) -> None:
    term = make_terms(3, [4])[0]
    parts = [make_part(domain, {"x": (term.a, term.b)}, w) for domain, w in (("a", 1), ("b", -1))]
    assert merge(parts, method) == {}
    found = deviation(parts, {})
    assert found.whole == 0
    assert found.by_module == {"x": 0}


@pytest.mark.parametrize("method", [PlainSum(), Cat(), Mean()], ids=lambda method: method.name)
def test_concatenated_factors_that_cancel_are_zero(method: Method) -> None:
    term = make_terms(3, [4])[0]
    parts = [make_part(domain, {"x": (term.a, term.b)}, w) for domain, w in (("a", 1), ("b", -1))]
    a, b = merge(parts, method)["x"]
    assert (b.double() @ a.double()).abs().max() < 1e-14
    assert deviation(parts, {"x": (a, b)}).whole == 0


def iso(delta: Matrix) -> Matrix:
    u, s, vh = np.linalg.svd(delta)
    level: Matrix = s[:4].mean() * u[:, :4] @ vh[:4]
    return level


@pytest.mark.parametrize(
    ("method", "factor"),
    [
        (PlainSum(), 1.5),
        (Mean(), 0.75),
        (TruncatedSvd(), 1.5),
        (CoreTsv(), 0.75),
        (CoreTies(1.0), 0.75),
        (CoreTies(1.0, "sum"), 1.5),
        (KnotsTies(1.0), 0.75),
        (CoreMagnitude(1.0), 1.5),
    ],
    ids=lambda value: getattr(value, "name", value),
)
def test_equal_deltas_merge_to_a_multiple_of_one(method: Method, factor: float) -> None:
    term = make_terms(3, [4])[0]
    # Weights 1 and 0.5, the second in other factors.
    twin = Term(1, term.a * -8, term.b / -16, 0.5)
    assert distance(merged_delta(method, [term, twin]), factor * deltas_of([term])[0]) < 1e-12


def test_the_level_of_equal_deltas_is_that_of_one() -> None:
    term = make_terms(3, [4])[0]
    twin = Term(1, term.a, term.b * 0.5, 0.5)
    assert distance(merged_delta(CoreIso(), [term, twin]), iso(1.5 * deltas_of([term])[0])) < 1e-12


def test_what_cancels_in_part_has_no_level() -> None:
    # The sum of two deltas of rank 3, of which two ranks cancel, is of rank 2: nothing of the
    # directions that are left over, which are rounding, comes in.
    first, second = make_terms(4, [3, 3])
    second = Term(
        1, torch.cat([first.a[:2], second.a[2:]]), torch.cat([-first.b[:, :2], second.b[:, 2:]], 1)
    )
    found = np.linalg.svd(merged_delta(CoreIso(), [first, second]), compute_uv=False)
    whole = np.linalg.svd(sum(deltas_of([first, second])), compute_uv=False)
    np.testing.assert_allclose(found[:2], whole[:2].mean())
    assert found[2] < 1e-12


@pytest.mark.parametrize(
    "method", [CoreTies(0.5), KnotsTies(0.5), CoreMagnitude(0.5), CoreDare(0.5), CoreTsv()]
)
def test_a_merge_stays_within_what_deltas_share(method: Method) -> None:
    first, second = make_terms(5, [3, 3])
    outputs = np.linalg.qr(first.b.numpy())[0]
    delta = merged_delta(method, [first, Term(1, second.a, first.b)])
    assert np.linalg.matrix_rank(delta) <= 3
    assert distance(outputs @ outputs.T @ delta, delta) < 1e-12
    if method.name != "knots-ties":  # It looks at single inputs, which no basis stands for.
        inputs = np.linalg.qr(first.a.numpy().T)[0]
        delta = merged_delta(method, [first, Term(1, first.a, second.b)])
        assert np.linalg.matrix_rank(delta) <= 3
        assert distance(delta @ inputs @ inputs.T, delta) < 1e-12


# How far a merge is from the plain sum.


def test_the_deviation_of_svd_is_the_rest_of_the_singular_values() -> None:
    terms = {m: make_terms(i, [4, 3]) for i, m in enumerate("xy")}
    parts = [
        make_part(d, {m: (terms[m][i].a, terms[m][i].b) for m in "xy"}, w)
        for i, (d, w) in enumerate((("law", 0.5), ("math", -2.0)))
    ]
    found = deviation(parts, merge(parts, TruncatedSvd(rank=3)))
    rest, whole = 0.0, 0.0
    for module in "xy":
        first, second = (
            f.b.double().numpy() @ f.a.double().numpy()
            for f in (part.adapter.modules[module] for part in parts)
        )
        squares = np.linalg.svd(0.5 * first - 2.0 * second, compute_uv=False) ** 2
        assert found.by_module[module] == pytest.approx(
            np.sqrt(squares[3:].sum() / squares.sum()), rel=1e-6
        )
        rest += squares[3:].sum()
        whole += squares.sum()
    assert found.whole == pytest.approx(np.sqrt(rest / whole), rel=1e-6)


def test_the_deviation_of_a_sum_is_rounding_and_that_of_a_mean_known() -> None:
    terms = make_terms(6, [4, 3])
    parts = [make_part(d, {"x": (t.a, t.b)}) for d, t in zip("ab", terms, strict=True)]
    assert deviation(parts, merge(parts, PlainSum())).whole < 1e-7
    assert deviation(parts, merge(parts, Mean())).whole == pytest.approx(0.5, rel=1e-6)
    assert deviation(parts, {}).whole == pytest.approx(1)
    nothing = [make_part("c", {"x": (terms[0].a, terms[0].b * 0)})]
    assert deviation(nothing, {}).whole == 0
    assert deviation(nothing, merge(parts, PlainSum())).by_module["x"] == np.inf

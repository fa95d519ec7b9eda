"""What is looked up: rows in line, nothing dropped without saying so."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from benchmarks.study.cells import change_cell, mean_cell, perplexity_cell
from benchmarks.study.config import Lambdas, Overlap, Seeds, Training
from benchmarks.study.experiments import lambdas, overlap
from benchmarks.study.statistics import WORST_LOSS, Interval, Losses
from benchmarks.study.study import Scoring, Study, total
from tests.benchmarks.study.conftest import MakeStudy
from tests.benchmarks.study.made_results import Made


def _write(made: Made, domain: str, tokens: list[int], groups: list[int]) -> None:
    made.workspace.rows.add(
        {
            "key": made.study.rows_key(domain, "test", made.study.template),
            "tokens": tokens,
            "groups": groups,
        }
    )


def _score(made: Made, scoring: Scoring, nats: list[float]) -> None:
    made.workspace.losses.add({"key": made.study.scoring_key(scoring), "nats": nats})


def test_the_router_and_the_union_are_on_the_same_rows(
    make_study: MakeStudy, tmp_path: Path
) -> None:
    """Row for row, so that their difference is paired; twins are one unit."""
    study = make_study()
    made = Made(study, tmp_path)
    a, b = study.fundamental("a", 0), study.fundamental("b", 0)
    _write(made, "a", [1, 2, 3], [7, 8, 7])
    _write(made, "b", [4, 5], [0, 1])
    for terms, nats_a, nats_b in (
        (total(a), [1.0, 2.0, 3.0], [90.0, 91.0]),
        (total(b), [80.0, 81.0, 82.0], [4.0, 5.0]),
        (total(a, b), [10.0, 20.0, 30.0], [40.0, 50.0]),
    ):
        _score(made, Scoring(terms, "a", study.template), nats_a)
        _score(made, Scoring(terms, "b", study.template), nats_b)
    results = made.results
    router = results.router({"a": a, "b": b})
    union = results.union(total(a, b), study.scored(["a", "b"]))
    assert router is not None
    assert union is not None
    assert list(router.nats) == [1 + 3, 2, 4, 5]
    assert list(union.nats) == [10 + 30, 20, 40, 50]
    assert list(router.tokens) == list(union.tokens) == [1 + 3, 2, 4, 5]
    assert router.strata == union.strata
    assert [clusters for _, clusters in router.strata] == [2, 2]
    # Without the template: the same rows in two templates are resampled alike.
    assert [name for name, _ in router.strata] == ["a test", "b test"]
    assert results.router({"a": a, "c": study.fundamental("c", 0)}) is None
    assert results.union(total(a, b), study.scored(["a", "c"])) is None


def _losses(mean: float) -> Losses:
    return Losses(np.array([mean, mean]), np.ones(2), (("rows", 2),))


def test_cells_say_of_how_many_they_are() -> None:
    known = [_losses(1.0), _losses(3.0)]
    assert perplexity_cell(known) == pytest.approx(np.exp(2))
    assert perplexity_cell([*known, None]) == "7.39 (2 of 3 seeds)"
    assert perplexity_cell([None]) is None
    assert perplexity_cell([*known, _losses(WORST_LOSS)]) == "not finite (1 of 3 seeds)"
    assert mean_cell([0.25, 0.75]) == 0.5
    assert mean_cell([0.25, None]) == "0.250 (1 of 2 values)"
    assert change_cell(None) is None
    assert change_cell(Interval(5, 4, 6, 3, 3, "rows and seeds")) == "+5.0 % [+4.0, +6.0]"
    assert change_cell(Interval(5, 4, 6, 1, 1, "rows")) == (
        "+5.0 % [+4.0, +6.0] (rows only, one seed)"
    )
    assert change_cell(Interval(5, 4, 6, 2, 3, "rows and seeds")) == (
        "+5.0 % [+4.0, +6.0] (2 of 3 seeds)"
    )
    no_ends = Interval(5, -np.inf, np.inf, 2, 2, "seeds")
    assert change_cell(no_ends) == "+5.0 % (no interval, n = 2)"


def test_a_change_says_how_many_seeds_are_known(make_study: MakeStudy, tmp_path: Path) -> None:
    results = Made(make_study(), tmp_path).results
    pair = (_losses(1.0), _losses(1.1))
    found = results.change([pair, (pair[0], None), pair])
    assert found is not None
    assert (found.n, found.asked) == (2, 3)
    assert results.change([(None, pair[0])]) is None


def test_pairs_know_whether_they_share_an_a(make_study: MakeStudy, tmp_path: Path) -> None:
    study = make_study(Seeds(shared=(0, 1)))
    made = Made(study, tmp_path)
    a, b, other = study.fundamental("a", 0), study.fundamental("b", 0), study.fundamental("b", 1)
    frozen = [study.fundamental("a", 0, block=(i, 2)) for i in (1, 2)]
    pairs = [(a, b), (a, other), (frozen[0], frozen[1])]
    made.cosines(pairs, lambda *_: 0.1)
    ranks = [found.shared_rank for pair in pairs if (found := made.results.pair(pair))]
    assert ranks == [a.rank, None, None]


def test_the_weight_is_chosen_on_validation_rows(make_study: MakeStudy, tmp_path: Path) -> None:
    """Test rows would have chosen another one."""
    study = make_study(lambdas=Lambdas(grid=(0.25, 0.5, 1.0)))
    made = Made(study, tmp_path)
    union = ("a", "b")
    candidates = lambdas.global_terms(study, study.arms[0], union)
    best_for = {"validation": 0.5, "test": 0.25}
    made.losses(
        [
            Scoring(terms, domain, study.template, part)
            for terms in candidates.values()
            for domain in union
            for part in ("validation", "test")
        ],
        lambda scoring: 1 + abs(scoring.terms[0][1] - best_for[scoring.part]),
    )
    assert lambdas.best_weight(made.results, candidates, union) == 0.5
    on_test = {
        w: each.mean
        for w, terms in candidates.items()
        if (each := made.results.union(terms, study.scored(union)))
    }
    assert min(on_test, key=lambda w: on_test[w]) == 0.25
    # As long as a weight is not known, none is chosen.
    assert lambdas.best_weight(made.results, {**candidates, 2.0: total(weight=1.0)}, union) is None


def test_the_edge_of_the_grid_is_told() -> None:
    assert lambdas.weights_cell([0.5, 0.25, None], [0.25, 0.5, 1.0]) == "0.25 (edge), 0.5"
    assert lambdas.weights_cell([1.0], [0.25, 0.5, 1.0]) == "1 (edge)"
    assert lambdas.weights_cell([None], [0.25, 1.0]) is None


def _study_of_sizes(make_study: MakeStudy, source: int, target: int) -> Study:
    study = make_study(
        training=Training(rows=None, epochs=3, learning_rate=5e-4, dropout=0.1, batch_size=4),
        overlap=Overlap("a", "b"),
    )
    files = dict(study.inputs.files)
    for domain, rows in (("a", source), ("b", target)):
        counts = {"train": rows, "validation": 10, "test": 10}
        files[domain] = type(files[domain])(domain, domain, counts)
    return Study(
        study.config,
        replace(study.inputs, files=files),
        {("a",): {"epochs": 9.0}, ("b",): {"dropout": 0.5}, ("a", "b"): {"batch_size": 32}},
    )


@pytest.mark.parametrize(("source", "target"), [(40, 100), (100, 40)])
def test_every_share_is_another_mixture_of_as_many_rows(
    make_study: MakeStudy, source: int, target: int
) -> None:
    """Whichever domain is the smaller one, and whatever tuning found for either."""
    study = _study_of_sizes(make_study, source, target)
    axis = study.config.overlap
    assert axis is not None
    specs = [overlap.mixed(study, axis, share, 0, shared=True) for share in axis.shares]
    assert [dict(spec.portions) for spec in specs] == [
        {"b": 40},
        {"a": 10, "b": 30},
        {"a": 20, "b": 20},
        {"a": 30, "b": 10},
        {"a": 40},
    ]
    options = {
        (s.epochs, s.batch_size, s.learning_rate, s.dropout)
        for s in [*specs, overlap.source(study, axis, 0)]
    }
    assert options == {(3, 4, 5e-4, 0.1)}

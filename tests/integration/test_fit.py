"""Fits against scores of the same rows, on a tiny base."""

from __future__ import annotations

import contextlib
import time
from pathlib import Path

import pytest
from tests.integration.harness import PATIENCE, Family, Served
from tests.makers import make_adapter

from superpose_client import FailedPreconditionError, FitResult, QueueFullError, Stream
from superpose_client.results import FitUpdate

TEXT = "The sum of two deltas is a delta"
# The same tokens, once they are cut, of rows that are no twins.
SAME = [TEXT + letter for letter in "abcdefghi"]
ROWS = [(f"why {name}?", f"because of {name[::-1]}") for name in ("sum", "fold", "mix", "row")]


def result_of(updates: Stream[FitUpdate]) -> FitResult:
    *progress, last = updates
    assert all(update.progress and not update.result for update in progress)
    evaluations = [update.progress.evaluations for update in progress if update.progress]
    assert evaluations == sorted(set(evaluations))
    assert last.result is not None
    assert evaluations[-1] == last.result.evaluations
    return last.result


def test_the_figures_are_those_of_scores(served: Served) -> None:
    before = served.client.mix()
    fitted = result_of(served.client.fit(ROWS, ["b", "a"], budget=9, scope="answer", max_length=60))
    assert served.client.mix() == before
    assert fitted.evaluations == 9
    assert [weight.domain for weight in fitted.weights] == ["b", "a"]
    assert {w.domain: w.weight for w in fitted.weights if w.weight} == fitted.mix.weights
    assert (fitted.fitted_rows, fitted.held_out_rows) == (3, 1)
    mixes = [candidate.mix.weights for candidate in fitted.candidates]
    usual = [{"a": 1, "b": 1}, {"a": 0.5, "b": 0.5}, {"b": 1}, {"a": 1}, {}]
    assert mixes[1:] == [mix for mix in usual if mix != mixes[0]]
    scored = served.client.score(ROWS, mixes=mixes, scope="answer", max_length=60)
    for candidate, block in zip(fitted.candidates, scored.mixes, strict=True):
        assert candidate.mix.digest == block.mix.digest
        nats = candidate.fitted_loss * fitted.fitted_tokens
        nats += candidate.held_out_loss.value * fitted.held_out_tokens
        assert nats == pytest.approx(-sum(item.logprob for item in block.items), rel=1e-5)
        (place,) = fitted.held_out
        (held_out,) = candidate.held_out_items
        assert held_out.tokens == block.items[place].tokens == fitted.held_out_tokens
        assert held_out.logprob == pytest.approx(block.items[place].logprob, rel=1e-5)
        excess = candidate.held_out_loss.value - fitted.candidates[0].held_out_loss.value
        assert candidate.excess.value == pytest.approx(excess, abs=1e-9)
    # The corners were scored in the first round.
    costs = [
        candidate.fitted_loss + 0.01 * sum(map(abs, candidate.mix.weights.values()))
        for candidate in fitted.candidates
    ]
    assert costs[0] == min(costs)
    assert "1 row is held out" in fitted.warnings[0]


def test_no_weight_of_a_grid_is_better(served: Served) -> None:
    length = len(TEXT)  # the tiny base has a token a character
    fitted = result_of(
        served.client.fit(SAME, ["a", "b"], low=-1, high=1, penalty=0, max_length=length)
    )
    grid = [{"a": i / 4, "b": j / 4} for i in range(-4, 5) for j in range(-4, 5)]
    scored = served.client.score([TEXT], mixes=grid, max_length=length)
    losses = [-block.items[0].logprob / block.tokens for block in scored.mixes]
    first = fitted.candidates[0]
    assert first.fitted_loss <= min(losses) + 1e-4
    assert first.held_out_loss.value == pytest.approx(first.fitted_loss, rel=1e-5)
    assert first.held_out_loss.low == pytest.approx(first.fitted_loss, rel=1e-5)


def test_one_domain_is_fitted_and_a_bound_is_told(served: Served) -> None:
    fitted = result_of(served.client.fit(ROWS, ["a"], low=0.001, high=0.002, budget=30))
    (weight,) = fitted.weights
    assert weight.weight in (0.001, 0.002)
    assert any(f"a stands at its bound {weight.weight}" in text for text in fitted.warnings)


def test_a_fit_that_is_left_stops_and_another_may_begin(served: Served) -> None:
    with served.client.fit(SAME, ["a", "b", "c"], budget=512, penalty=0) as updates:
        assert next(updates).progress is not None
    deadline = time.monotonic() + PATIENCE
    fitted = None
    while fitted is None:
        assert time.monotonic() < deadline, "the fit runs on"
        with contextlib.suppress(QueueFullError):
            fitted = result_of(served.client.fit(ROWS, ["a"], budget=2))
    engine = served.runtime.local
    with engine._wake:
        assert engine._wake.wait_for(engine._idle, PATIENCE), "a score runs on"


def test_a_mix_without_finite_output_is_named(served: Served, gpt2: Family, tmp_path: Path) -> None:
    served.client.push("huge", make_adapter(gpt2.model, tmp_path / "huge", 9, size=1e30))
    with pytest.raises(FailedPreconditionError, match=r"not finite under a=0\.5,huge=0\.5"):
        result_of(served.client.fit(ROWS, ["a", "huge"], low=-1e4, high=1e4))
    assert result_of(served.client.fit(ROWS, ["a"], budget=2)).evaluations == 2

"""Residency auto: only speed depends on what is folded, and folds earn their price."""

from __future__ import annotations

import dataclasses
import itertools
import random
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tests.server.helpers import GREEDY, Bench, Client, bound, random_adapter

from superpose_adapters.adapter import Adapter
from superpose_adapters.mix import BoundMix
from superpose_server.engine.residency import Residency, StepCost
from superpose_server.errors import FailedPrecondition, Internal
from superpose_server.weights.resident import PreparedMix

A, B, C, D = (bound((Adapter(digest * 64, {}), 1.0)) for digest in "abcd")
BASE = bound()


# Costs


def observed(cost: StepCost, a: float, b: float, c: float, steps: int, noise: float = 0.0) -> None:
    numbers = random.Random(0)
    for _ in range(steps):
        rows = numbers.randint(1, 16)
        corrected = numbers.randint(0, rows)
        prompts = numbers.choice([0, 0, 7, 128])
        seconds = a + b * rows + c * corrected + 0.5e-3 * prompts
        cost.observe(rows, corrected, seconds * (1 + noise * numbers.uniform(-1, 1)), prompts)


@pytest.mark.parametrize("c", [0.0, 0.2e-3, 3e-3])
def test_known_costs_are_recovered(c: float) -> None:
    cost = StepCost()
    observed(cost, 8e-3, 1e-3, c, 300)
    assert cost.seconds_a_corrected_row == pytest.approx(c, rel=1e-3, abs=1e-6)


def test_costs_are_recovered_from_steps_that_vary() -> None:
    cost = StepCost()
    observed(cost, 8e-3, 1e-3, 2e-3, 600, noise=0.1)
    assert cost.seconds_a_corrected_row == pytest.approx(2e-3, rel=0.15)


def test_costs_follow_what_changes() -> None:
    cost = StepCost()
    observed(cost, 8e-3, 1e-3, 3e-3, 600)
    observed(cost, 8e-3, 1e-3, 0.5e-3, 1500)
    assert cost.seconds_a_corrected_row == pytest.approx(0.5e-3, rel=1e-2)


def test_nothing_costs_nothing_and_no_cost_is_negative() -> None:
    cost = StepCost()
    assert cost.seconds_a_corrected_row == 0
    observed(cost, 8e-3, 1e-3, -0.5e-3, 300)  # as if corrections saved time
    assert cost.seconds_a_corrected_row == 0


# The policy


class FixedCost(StepCost):
    """What a corrected row costs, whatever was observed."""

    def __init__(self, seconds: float) -> None:
        super().__init__()
        self.seconds = seconds

    @property
    def seconds_a_corrected_row(self) -> float:
        return self.seconds


FOLD = 1.0


class Traffic:
    """A policy under traffic, where a corrected row costs `row` and a fold costs 1."""

    def __init__(self, row: float, resident: BoundMix = BASE) -> None:
        self.policy = Residency()
        self.policy.cost = FixedCost(row)
        self.policy.folded(FOLD)
        self.row = row
        self.resident = resident
        self.folds = 0
        self.spent = 0.0

    def step(self, *rows: BoundMix) -> BoundMix | None:
        self.spent += self.row * sum(mix.digest != self.resident.digest for mix in rows)
        target = self.policy.choose(rows, self.resident)
        if target is not None:
            assert target in rows
            self.folds += 1
            self.spent += FOLD
            self.resident = target
            self.policy.folded(FOLD)
        return target


def test_nothing_is_folded_while_corrections_cost_nothing() -> None:
    traffic = Traffic(row=0.0)
    assert all(traffic.step(A, A, A) is None for _ in range(2000))


@pytest.mark.parametrize("rows", [1, 4])
def test_the_mix_of_most_rows_is_folded_when_correcting_it_has_cost_a_fold(rows: int) -> None:
    traffic = Traffic(row=0.01)
    steps = next(n for n in itertools.count(1) if traffic.step(*[A] * rows))
    assert steps == pytest.approx(FOLD / (0.01 * rows), abs=2)
    assert traffic.resident is A
    assert all(traffic.step(*[A] * rows) is None for _ in range(1000))


def test_what_counts_is_what_the_fold_would_spare() -> None:
    # Two rows more than those of the resident mix, which a fold would have to correct.
    traffic = Traffic(row=0.01, resident=B)
    steps = next(n for n in itertools.count(1) if traffic.step(A, B, A, A))
    assert steps == pytest.approx(50, abs=2)


def test_a_mix_that_no_fold_would_spare_is_corrected_for_ever() -> None:
    traffic = Traffic(row=0.1, resident=A)
    for rows in ((A, B), (A, A, B), (B, C, A), ()):
        assert all(traffic.step(*rows) is None for _ in range(500))


def test_the_base_may_be_the_mix_of_most_rows() -> None:
    traffic = Traffic(row=0.1, resident=A)
    while traffic.step(BASE, BASE, A) is None:
        pass
    assert traffic.resident is BASE


def test_what_was_refused_is_never_chosen_and_does_not_hide_the_next() -> None:
    traffic = Traffic(row=0.1)
    traffic.policy.refuse(A)
    assert all(traffic.step(A, A, A) is None for _ in range(500))
    steps = next(n for n in itertools.count(1) if traffic.step(A, A, A, B))
    assert steps < 20
    assert traffic.resident is B


def test_traffic_that_swings_moves_little() -> None:
    for period in (1, 2, 5, 9):
        traffic = Traffic(row=0.1)
        for step in range(1000):
            traffic.step(A if step // period % 2 else B)
        # Each fold was earned by its own price in corrections.
        assert traffic.folds * FOLD <= traffic.spent - traffic.folds * FOLD + FOLD
        assert traffic.folds <= 2 + 1000 * traffic.row / FOLD


def best_in_hindsight(steps: Sequence[Sequence[BoundMix]], row: float, first: BoundMix) -> float:
    """The least that any choice of folds after each step costs."""
    mixes = {mix.digest: mix for rows in steps for mix in rows} | {first.digest: first}
    best = {digest: 0.0 if digest == first.digest else FOLD for digest in mixes}
    for rows in steps:
        after = {
            digest: cost + row * sum(mix.digest != digest for mix in rows)
            for digest, cost in best.items()
        }
        least = min(after.values())
        best = {digest: min(cost, least + FOLD) for digest, cost in after.items()}
    return min(best.values())


@st.composite
def traffics(draw: st.DrawFn) -> list[list[BoundMix]]:
    """Requests that come and go: each of a mix, for a number of steps, in up to four slots."""
    seed = draw(st.integers(0, 2**32))
    numbers = random.Random(seed)
    slots = draw(st.integers(1, 4))
    longest = draw(st.sampled_from([2, 10, 40, 150]))
    popular = draw(st.sampled_from([0.25, 0.5, 0.8, 0.95]))
    left = [0] * slots
    mixes = [A] * slots
    steps = []
    for _ in range(600):
        for slot in range(slots):
            if left[slot] == 0:
                left[slot] = numbers.randint(1, longest)
                mixes[slot] = A if numbers.random() < popular else numbers.choice((B, C, D))
            left[slot] -= 1
        steps.append(list(mixes))
    return steps


@settings(max_examples=20)
@given(steps=traffics(), row=st.sampled_from([0.005, 0.02, 0.1, 0.5]))
def test_random_traffic_costs_at_most_thrice_the_best_in_hindsight(
    steps: list[list[BoundMix]], row: float
) -> None:
    traffic = Traffic(row)
    for rows in steps:
        traffic.step(*rows)
    # Three folds in the beginning are no failure.
    assert traffic.spent <= 3 * best_in_hindsight(steps, row, BASE) + 3 * FOLD


@example(most=40, others=1)
@given(most=st.integers(1, 60), others=st.integers(1, 60))
def test_mostly_one_mix_costs_at_most_thrice_the_best_in_hindsight(most: int, others: int) -> None:
    # One row at a time: so many tokens of one mix, then so many of another, and so on.
    steps = [[A]] * most + [[B]] * others
    steps *= 3000 // len(steps)
    traffic = Traffic(row=0.02)
    for rows in steps:
        traffic.step(*rows)
    assert traffic.spent <= 3 * best_in_hindsight(steps, 0.02, BASE) + 3 * FOLD


# The engine


class Priced(Residency):
    """Folds at fixed prices, so that nothing depends on the machine's speed."""

    def __init__(self, row: float, fold: float) -> None:
        super().__init__()
        self.cost = FixedCost(row)
        self._price = fold
        super().folded(fold)

    def folded(self, seconds: float) -> None:
        assert seconds > 0
        super().folded(self._price)


def residency_bench(folder: Path, dtype: torch.dtype = torch.float32, fold: float = 4.0) -> Bench:
    bench = Bench(folder, dtype=dtype)
    bench.engine._residency = Priced(1.0, fold)
    return bench


def mixes_of(bench: Bench) -> list[BoundMix]:
    one, two = random_adapter(bench.layout, 1), random_adapter(bench.layout, 2, rank=2)
    return [
        bench.mix((one, 1.0)),
        bench.mix(),
        bench.mix((one, -0.8), (two, 0.5)),
        bench.mix((two, 1.0)),
    ]


LONG = dataclasses.replace(GREEDY, max_new_tokens=20)
FULL = dataclasses.replace(GREEDY, max_new_tokens=60)


def test_texts_are_the_same_while_mixes_shift(base: Path) -> None:
    bench = residency_bench(base)
    mixes = mixes_of(bench)
    rows: list[tuple[int, BoundMix, Client]] = []
    residents = []
    # Most rows ask for one mix after the other, and one row asks for another one each time.
    for favourite in (0, 2, 3, 1, 0):
        other = (favourite + 1) % 4
        asked = [mixes[favourite]] * 3 + [mixes[other]]
        for first, mix in enumerate(asked, start=65):
            rows.append((first, mix, bench.submit([first], mix, LONG)[1]))
        before = [len(client.tokens) for _, _, client in rows[-4:]]
        while not all(client.ended for _, _, client in rows):
            bench.engine.step()
            now = [len(client.tokens) for _, _, client in rows[-4:]]
            # Every row gets tokens in every step, whoever is resident.
            assert all(
                n > was or client.ended
                for n, was, (_, _, client) in zip(now, before, rows[-4:], strict=True)
            )
            before = now
        residents.append(bench.engine.resident.digest)
    assert residents == [mixes[i].digest for i in (0, 2, 3, 1, 0)]
    assert bench.observer.folds == [True] * 5
    for first, mix, client in rows:
        assert client.tokens == bench.alone([first], mix, LONG.limit)
    # A fold is worth it: afterwards only the other row is corrected.
    corrected = [count for _, count in bench.observer.steps]
    assert corrected.count(1) > 3 * corrected.count(3)


def test_a_mix_is_folded_though_every_step_has_a_prompt(bases: dict[str, Path]) -> None:
    bench = Bench(bases["gpt2"], slots=3, prefill_tokens=4)
    bench.engine._residency = Residency()
    mix = mixes_of(bench)[0]
    clients = [bench.submit([65 + i], mix, FULL)[1] for i in range(2)]
    bench.engine.step()
    steps = 0
    while not any(client.ended for client in clients):
        if len(bench.scheduler.running) < 3:
            bench.submit(list(range(40)), bench.mix(), dataclasses.replace(FULL, max_new_tokens=1))
        bench.engine.step()
        steps += 1
    assert steps > 40
    assert bench.engine.resident.digest == mix.digest
    for i, client in enumerate(clients):
        assert client.tokens == bench.alone([65 + i], mix, FULL.limit)


def test_what_the_operator_folds_is_the_operators(bases: dict[str, Path]) -> None:
    bench = residency_bench(bases["gpt2"])
    mixes = mixes_of(bench)
    _, client = bench.submit([65], mixes[0], LONG)
    for mix in (mixes[2], mixes[3]):
        bench.fold(mix)  # begins the debt anew
        assert bench.engine.resident is mix
    bench.run()
    assert bench.engine.resident.digest == mixes[0].digest
    assert client.tokens == bench.alone([65], mixes[0], LONG.limit)


def test_without_it_only_the_operator_folds(bases: dict[str, Path]) -> None:
    bench = Bench(bases["gpt2"])
    mixes = mixes_of(bench)
    for _ in range(4):
        bench.submit([65], mixes[0], LONG)
    bench.run()
    assert bench.observer.folds == []


def count_prepared(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    digests: list[str] = []
    real = bench.weights.prepare

    def counting(mix: BoundMix) -> PreparedMix:
        digests.append(mix.digest)
        return real(mix)

    monkeypatch.setattr(bench.weights, "prepare", counting)
    return digests


def test_a_mix_that_rounding_would_swallow_is_tried_once(
    bases: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = []
    for auto in (True, False):
        bench = residency_bench(bases["gpt2"], torch.bfloat16)
        if not auto:
            bench.engine._residency = None
        faint = bench.mix((random_adapter(bench.layout, 1, size=1e-5), 1.0))
        assert not bench.weights.prepare(faint).foldable
        prepared = count_prepared(bench, monkeypatch)
        clients = [bench.submit([65 + i], faint, LONG)[1] for i in range(3)]
        bench.run()
        assert prepared == [faint.digest] * auto
        assert bench.observer.folds == []
        assert bench.engine.resident.digest == bench.mix().digest
        texts.append([client.tokens for client in clients])
    assert texts[0] == texts[1]


@pytest.mark.parametrize(
    "error", [FailedPrecondition("too large", "FOLD_NOT_FINITE"), Internal("broken", "FOLD_FAILED")]
)
def test_a_fold_that_fails_is_tried_once_and_harms_no_row(
    bases: dict[str, Path], monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    bench = residency_bench(bases["gpt2"])
    mix = mixes_of(bench)[0]
    calls = []

    def failing(*_: object) -> None:
        calls.append(1)
        raise error

    phase = "prepare" if isinstance(error, FailedPrecondition) else "fold"
    monkeypatch.setattr(bench.weights, phase, failing)
    clients = [bench.submit([65 + i], mix, LONG)[1] for i in range(3)]
    bench.run()
    assert calls == [1]
    for i, client in enumerate(clients):
        assert client.tokens == bench.alone([65 + i], mix, LONG.limit)


@settings(max_examples=10)
@given(
    plan=st.lists(
        st.tuples(st.integers(0, 6), st.integers(0, 3), st.integers(1, 12)), min_size=1, max_size=8
    ),
    fold=st.sampled_from([0.5, 3.0, 9.0]),
)
def test_any_traffic_gets_the_texts_of_each_request_alone(
    bases: dict[str, Path], plan: list[tuple[int, int, int]], fold: float
) -> None:
    bench = residency_bench(bases["gpt2"], fold=fold)
    mixes = mixes_of(bench)
    rows = []
    for pause, mix, tokens in plan:
        for _ in range(pause):
            bench.engine.step()
        params = dataclasses.replace(GREEDY, max_new_tokens=tokens)
        rows.append((mix, tokens, bench.submit([72, mix], mixes[mix], params)[1]))
    bench.run()
    for mix, tokens, client in rows:
        assert client.tokens == bench.alone([72, mix], mixes[mix], 12)[:tokens]

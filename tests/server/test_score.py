"""Scores in slices, against float64 log-probabilities of transformers."""

from __future__ import annotations

import dataclasses
import functools
import shutil
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.server.helpers import GREEDY, Bench, random_adapter
from torch import Tensor

from superpose_adapters.mix import BoundMix
from superpose_server.engine.job import JobResult
from superpose_server.engine.score import RowScore, ScoreRow
from superpose_server.errors import FailedPrecondition
from superpose_server.model.batch import Batch, Span
from superpose_server.model.model import Model

CONTEXT = 64


@pytest.fixture(params=[False, True], ids=["torch", "kernels"])
def make(request: pytest.FixtureRequest, base: Path) -> functools.partial[Bench]:
    kernels = bool(request.param)
    if kernels and not (shutil.which("c++") or shutil.which("g++")):
        pytest.skip("no C++ compiler")
    return functools.partial(Bench, base, kernels=kernels)


def text(seed: int, length: int) -> tuple[int, ...]:
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randint(0, 256, (length,), generator=generator).tolist())


class Exact:
    """Log-probabilities of whole texts under a mix, in float64."""

    def __init__(self, bench: Bench, mix: BoundMix) -> None:
        self._reference = bench.reference(mix)

    def __call__(self, row: ScoreRow) -> Tensor:
        following = torch.tensor(row.ids[row.first :], dtype=torch.int64)[:, None]
        return self._places(row).gather(1, following)[:, 0]

    def likeliest(self, row: ScoreRow) -> list[Any]:
        """Return the likeliest tokens in each place, as topk does."""
        return [place.topk(row.top) for place in self._places(row)]

    def _places(self, row: ScoreRow) -> Tensor:
        with torch.inference_mode():
            logits: Tensor = self._reference(torch.tensor([row.ids])).logits[0, :-1]
        return logits.log_softmax(-1)[row.first - 1 :]


def check(found: list[RowScore], rows: list[ScoreRow], exact: Exact) -> None:
    assert len(found) == len(rows)
    for score, row in zip(found, rows, strict=True):
        values = score.logprobs
        expected = exact(row)
        assert len(values) == len(expected)
        assert torch.allclose(
            torch.tensor(values, dtype=torch.float64), expected, rtol=0, atol=2e-4
        )
        likeliest = exact.likeliest(row)
        assert len(score.top_logprobs) == (len(expected) if row.top else 0)
        for place, top in zip(likeliest, score.top_logprobs, strict=False):
            assert list(top.token_ids) == place.indices.tolist()
            assert list(top.logprobs) == pytest.approx(place.values.tolist(), abs=2e-4)


class Scored:
    """Notes the slices of scored texts, which run in the scratch slot."""

    def __init__(self, model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
        self.slices: list[list[Span]] = []
        real = model.run

        def noting(batch: Batch, keep: Tensor) -> Tensor:
            if batch.spans[0].slot == model.scratch_slot:
                self.slices.append(list(batch.spans))
            return real(batch, keep)

        monkeypatch.setattr(model, "run", noting)

    @property
    def largest(self) -> int:
        return max(sum(len(span.ids) for span in spans) for spans in self.slices)


def score(bench: Bench, rows: list[ScoreRow], mix: BoundMix) -> list[RowScore]:
    return run(bench, bench.engine.score(rows, [mix] * len(rows)))


def run(bench: Bench, future: Future[JobResult[list[RowScore]]]) -> list[RowScore]:
    for _ in range(200):
        if future.done():
            return future.result().value
        bench.engine.step()
    raise AssertionError("the score does not end")


@pytest.mark.parametrize("budget", [1, 7, 32, 64, 128])
def test_a_text_longer_than_a_slice(
    make: functools.partial[Bench], budget: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench = make(prefill_tokens=budget)
    mix = bench.mix((random_adapter(bench.layout, 1), 1.0))
    slices = Scored(bench.model, monkeypatch)
    rows = [ScoreRow(text(0, CONTEXT))]
    check(score(bench, rows, mix), rows, Exact(bench, mix))
    assert len(slices.slices) == -(-CONTEXT // budget)
    assert slices.largest == min(budget, CONTEXT)


def test_the_likeliest_tokens_in_each_place_for_rows_that_ask(
    make: functools.partial[Bench],
) -> None:
    bench = make(prefill_tokens=16)
    mix = bench.mix((random_adapter(bench.layout, 1), 1.0))
    rows = [ScoreRow(text(0, 20), top=1), ScoreRow(text(1, 5)), ScoreRow(text(2, 9), 4, top=3)]
    found = score(bench, rows, mix)
    check(found, rows, Exact(bench, mix))
    assert [len(row.top_logprobs) for row in found] == [19, 0, 5]


def test_short_texts_share_slices_and_the_slot(
    make: functools.partial[Bench], monkeypatch: pytest.MonkeyPatch
) -> None:
    bench = make(prefill_tokens=16)
    mix = bench.mix((random_adapter(bench.layout, 1), 1.0))
    slices = Scored(bench.model, monkeypatch)
    # 48 tokens: they fit the slot of 64 behind one another, and three slices.
    rows = [ScoreRow(text(i, 4)) for i in range(12)]
    check(score(bench, rows, mix), rows, Exact(bench, mix))
    assert [[len(span.ids) for span in spans] for spans in slices.slices] == [[4] * 4] * 3
    assert [span.start for spans in slices.slices for span in spans] == list(range(0, 48, 4))


def test_the_slot_begins_anew_when_it_is_full(
    make: functools.partial[Bench], monkeypatch: pytest.MonkeyPatch
) -> None:
    bench = make(prefill_tokens=100)
    mix = bench.mix()
    slices = Scored(bench.model, monkeypatch)
    rows = [ScoreRow(text(i, 24)) for i in range(5)]  # two fit
    check(score(bench, rows, mix), rows, Exact(bench, mix))
    assert [len(spans) for spans in slices.slices] == [2, 2, 1]


def test_rows_of_several_mixes_share_slices(
    make: functools.partial[Bench], monkeypatch: pytest.MonkeyPatch
) -> None:
    bench = make(prefill_tokens=16)
    one, two = random_adapter(bench.layout, 1), random_adapter(bench.layout, 2, rank=2)
    mixes = [bench.mix((one, 0.5 * i), (two, 1 - 0.25 * i)) for i in range(4)] + [bench.mix()]
    rows = [ScoreRow(text(0, 9)), ScoreRow(text(1, 3)), ScoreRow(text(2, 6), first=4)]
    slices = Scored(bench.model, monkeypatch)
    asked = [mix for mix in mixes for _ in rows]
    found = run(bench, bench.engine.score(rows * len(mixes), asked))
    for at, mix in enumerate(mixes):
        check(found[3 * at : 3 * at + 3], rows, Exact(bench, mix))
    # 90 tokens: three texts of a mix, with the first of the next, fill the slot of 64.
    assert len(slices.slices) <= 90 // 16 + 2


def test_a_curve_takes_about_the_passes_that_its_tokens_need(
    base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """21 weights over 32 rows, which no weight and no row takes a pass of its own for."""
    bench = Bench(base, kernels=False, prefill_tokens=32)
    one, two = random_adapter(bench.layout, 1), random_adapter(bench.layout, 2)
    mixes = [bench.mix((one, round(-1 + 0.15 * i, 2)), (two, 0.5)) for i in range(21)]
    rows = [ScoreRow(text(i, 5 + 7 * i % 16)) for i in range(32)]
    slices = Scored(bench.model, monkeypatch)
    job = bench.engine.score(rows * len(mixes), [mix for mix in mixes for _ in rows])
    while not job.done():
        bench.engine.step()
    assert len(job.result().value) == 21 * 32
    tokens = 21 * sum(len(row.ids) for row in rows)
    assert tokens == sum(len(span.ids) for spans in slices.slices for span in spans)
    assert len(slices.slices) <= 1.5 * tokens / 32


def test_the_bits_of_a_score_do_not_depend_on_the_mixes_beside_it(base: Path) -> None:
    if not (shutil.which("c++") or shutil.which("g++")):
        pytest.skip("no C++ compiler")
    bench = Bench(base, kernels=True, prefill_tokens=16)
    adapters = [random_adapter(bench.layout, i, rank=1 + i) for i in range(3)]
    mixes = [
        bench.mix(),
        bench.mix((adapters[0], 1.0)),
        bench.mix((adapters[1], -0.5), (adapters[2], 2.0)),
        bench.mix(*((adapter, 0.3) for adapter in adapters)),
    ]
    rows = [ScoreRow(text(0, 21)), ScoreRow(text(1, 5)), ScoreRow(text(2, 13), first=4)]
    bench.fold(mixes[1])
    alone = [score(bench, rows, mix) for mix in mixes]
    for order in (mixes, mixes[::-1], mixes[1:3]):
        asked = [mix for mix in order for _ in rows]
        found = run(bench, bench.engine.score(rows * len(order), asked))
        assert found == [row for mix in order for row in alone[mixes.index(mix)]]


def test_plans_of_many_mixes_are_not_kept(make: functools.partial[Bench]) -> None:
    bench = make(prefill_tokens=4)
    one = random_adapter(bench.layout, 1)
    mixes = [bench.mix((one, 0.01 * i)) for i in range(1, 151)]
    job = bench.engine.score([ScoreRow((1, 2, 3, 4))] * len(mixes), mixes)
    most = 0
    while not job.done():
        bench.engine.step()
        most = max(most, len(bench.engine.runner._corrections._plans))
    assert 1 < most <= 64


def test_each_row_has_its_mix(make: functools.partial[Bench]) -> None:
    bench = make()
    with pytest.raises(ValueError, match="2 rows with 1 mixes"):
        run(bench, bench.engine.score([ScoreRow((1, 2))] * 2, [bench.mix()]))


def test_only_what_is_asked_for_is_scored(make: functools.partial[Bench]) -> None:
    bench = make(prefill_tokens=5)
    mix = bench.mix((random_adapter(bench.layout, 1), -1.0))
    # Of some slices no token is wanted; of some texts only the last, or all but the first.
    rows = [
        ScoreRow(text(0, 20), first=19),
        ScoreRow(text(1, 1)),
        ScoreRow(text(2, 11), first=3),
        ScoreRow(text(3, 2)),
        ScoreRow(text(4, 12), first=12),
    ]
    check(score(bench, rows, mix)[:4], rows[:4], Exact(bench, mix))
    assert [len(row.logprobs) for row in score(bench, rows, mix)] == [1, 0, 8, 1, 0]


def test_jobs_at_once_do_not_overwrite_one_another(make: functools.partial[Bench]) -> None:
    bench = make(prefill_tokens=8)
    one = random_adapter(bench.layout, 1)
    mixes = [bench.mix(), bench.mix((one, 1.0)), bench.mix((one, -0.5))]
    jobs = [
        [ScoreRow(text(0, 50)), ScoreRow(text(1, 13))],
        [ScoreRow(text(2, 5)), ScoreRow(text(3, 30)), ScoreRow(text(4, 3))],
        [ScoreRow(text(5, 8)), ScoreRow(text(6, 24))],  # ends where slices end
    ]
    futures = [
        bench.engine.score(rows, [mix] * len(rows)) for rows, mix in zip(jobs, mixes, strict=True)
    ]
    for _ in range(60):
        bench.engine.step()
    for future, rows, mix in zip(futures, jobs, mixes, strict=True):
        check(future.result(timeout=0).value, rows, Exact(bench, mix))


def test_texts_are_scored_beside_rows_of_other_mixes_and_folds(
    make: functools.partial[Bench], monkeypatch: pytest.MonkeyPatch
) -> None:
    bench = make(prefill_tokens=8)
    one, two = random_adapter(bench.layout, 1), random_adapter(bench.layout, 2, rank=2)
    mixes = [bench.mix((one, 1.0)), bench.mix(), bench.mix((two, 1.0), (one, 0.5))]
    asked = bench.mix((two, -1.0))
    slices = Scored(bench.model, monkeypatch)
    params = dataclasses.replace(GREEDY, max_new_tokens=12)
    clients = [bench.submit([65 + i], mix, params)[1] for i, mix in enumerate(mixes)]
    rows = [ScoreRow(text(0, 50)), ScoreRow(text(1, 9)), ScoreRow(text(2, 20), first=4)]
    future = bench.engine.score(rows, [asked] * len(rows))
    for resident in (asked, mixes[0], mixes[2], mixes[1], asked):
        before = len(slices.slices)
        bench.fold(resident)
        assert len(slices.slices) - before <= 1  # a step has one slice
    bench.run()
    while not future.done():
        bench.engine.step()
    check(future.result().value, rows, Exact(bench, asked))
    assert slices.largest <= 8
    for i, (client, mix) in enumerate(zip(clients, mixes, strict=True)):
        assert client.tokens == bench.alone([65 + i], mix, 12)


def test_scores_under_a_corrected_head(bases: dict[str, Path]) -> None:
    # The head sees only the tokens whose logits are wanted.
    for kernels in [False] + [True] * bool(shutil.which("c++") or shutil.which("g++")):
        bench = Bench(bases["llama"], kernels=kernels, prefill_tokens=10)
        modules = ("lm_head", "model.layers.0.mlp.down_proj")
        one = random_adapter(bench.layout, 1, modules=modules)
        mix = bench.mix((one, 1.0))
        rows = [ScoreRow(text(0, 33), first=13), ScoreRow(text(1, 6), first=5)]
        check(score(bench, rows, mix), rows, Exact(bench, mix))
        _, client = bench.submit([65], mix)
        _, other = bench.submit([66, 67, 68], bench.mix())
        bench.run()
        assert client.tokens == bench.alone([65], mix)
        assert other.tokens == bench.alone([66, 67, 68], bench.mix())


def test_a_text_whose_output_is_not_finite_harms_no_other(make: functools.partial[Bench]) -> None:
    bench = make(prefill_tokens=8)
    huge = bench.mix((random_adapter(bench.layout, 1, size=1e30), 1e4))
    rows = [ScoreRow(text(0, 30))]
    with pytest.raises(FailedPrecondition, match="not finite"):
        score(bench, rows, huge)
    check(score(bench, rows, bench.mix()), rows, Exact(bench, bench.mix()))


@pytest.fixture(scope="module")
def shared(bases: dict[str, Path]) -> Bench:
    return Bench(bases["llama"], kernels=False)


JOB = st.lists(st.tuples(st.integers(1, CONTEXT), st.integers(1, CONTEXT)), min_size=1, max_size=5)


@settings(max_examples=25)
@given(jobs=st.lists(JOB, min_size=1, max_size=3), budget=st.integers(1, 80))
def test_any_texts_in_any_slices(
    shared: Bench, jobs: list[list[tuple[int, int]]], budget: int
) -> None:
    shared.engine._prefill_tokens = budget
    mix = shared.mix()
    exact = Exact(shared, mix)
    asked = [
        [ScoreRow(text(i, length), min(first, length)) for i, (length, first) in enumerate(job)]
        for job in jobs
    ]
    futures = [shared.engine.score(rows, [mix] * len(rows)) for rows in asked]
    for _ in range(3000):
        if all(future.done() for future in futures):
            break
        shared.engine.step()
    for future, rows in zip(futures, asked, strict=True):
        found = future.result(timeout=0).value
        long = [i for i, row in enumerate(rows) if len(row.ids) > 1]
        check([found[i] for i in long], [rows[i] for i in long], exact)

from __future__ import annotations

import dataclasses
import gc
import weakref
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tests.server.helpers import GREEDY, Bench, Client, flip_bit, key_values, random_adapter
from torch import Tensor, nn

from superpose_adapters.adapter import Adapter
from superpose_adapters.mix import BoundMix
from superpose_server.engine.observer import EngineObserver
from superpose_server.engine.sampling import SamplingParams
from superpose_server.engine.score import ScoreRow
from superpose_server.engine.sequence import Chunk, FinishReason
from superpose_server.errors import FailedPrecondition, Internal, QueueFull, ShuttingDown
from superpose_server.model.batch import Batch
from superpose_server.model.memory import is_out_of_memory
from superpose_server.model.packed import PackedLinear
from superpose_server.weights import pace
from superpose_server.weights.dense_correction import DenseCorrection
from superpose_server.weights.kernel_correction import KernelCorrection
from superpose_server.weights.parameter_format import PackedFormat, PlainFormat

PROMPTS = [[72, 101, 108], [65], [10, 20, 30, 40, 50, 60, 70], [200, 3]]


@pytest.fixture
def bench(bases: dict[str, Path], kernels: bool) -> Bench:
    return Bench(bases["gpt2"], kernels=kernels)


@pytest.fixture
def adapters(bench: Bench) -> tuple[Adapter, Adapter]:
    return random_adapter(bench.layout, 1), random_adapter(bench.layout, 2, rank=2)


def four_mixes(bench: Bench) -> list[BoundMix]:
    one, two = random_adapter(bench.layout, 1), random_adapter(bench.layout, 2, rank=2)
    return [
        bench.mix((one, 1.0)),
        bench.mix(),
        bench.mix((one, -0.8), (two, 0.5)),
        bench.mix((two, 1.0)),
    ]


def params(**changes: Any) -> SamplingParams:
    return dataclasses.replace(GREEDY, **changes)


def check_logprobs(bench: Bench, prompt: list[int], mix: BoundMix, client: Client) -> None:
    """Check the log-probability of each token of a row against the reference."""
    ids = torch.tensor([prompt + client.tokens])
    with torch.inference_mode():
        logits = bench.reference(mix)(ids).logits
    exact = logits.log_softmax(-1)[0, len(prompt) - 1 : -1]
    expected = exact.gather(1, ids[0, len(prompt) :, None])[:, 0].tolist()
    assert client.logprobs == pytest.approx(expected, abs=2e-4)
    assert len(client.logprobs) == GREEDY.max_new_tokens


# What a row gets does not depend on what is resident or who shares the batch.


def test_four_mixes_in_one_batch_give_the_texts_of_each_alone_while_folds_happen(
    base: Path, kernels: bool
) -> None:
    bench = Bench(base, kernels=kernels)
    mixes = four_mixes(bench)
    # One prompt, so that texts differ by their mixes alone.
    clients = [bench.submit(PROMPTS[0], mix)[1] for mix in mixes]
    for resident in [*mixes, *reversed(mixes), *mixes]:
        bench.fold(resident)
    bench.run()
    expected = [bench.alone(PROMPTS[0], mix) for mix in mixes]
    assert [client.tokens for client in clients] == expected
    assert len({tuple(tokens) for tokens in expected}) == len(mixes)
    assert bench.observer.steps[0] == (4, 3)
    assert len(bench.observer.folds) == 12
    assert all(client.reason is FinishReason.LENGTH for client in clients)


class Plan:
    """A schedule: who comes at which step, and what is folded when."""

    def __init__(self, draw: st.DrawFn) -> None:
        row = st.tuples(
            st.integers(0, 8),  # step
            st.integers(0, 3),  # prompt
            st.integers(0, 3),  # mix
            st.integers(1, 8),  # tokens
            st.one_of(st.none(), st.integers(1, 6)),  # cancelled so many steps later
        )
        self.rows = draw(st.lists(row, min_size=1, max_size=6))
        self.folds = draw(st.dictionaries(st.integers(0, 12), st.integers(0, 3), max_size=6))
        self.prefill_tokens = draw(st.sampled_from([128, 5, 1]))

    def __repr__(self) -> str:
        return f"Plan(rows={self.rows}, folds={self.folds}, prefill_tokens={self.prefill_tokens})"


PLANS = st.composite(Plan)()


@given(plan=PLANS)
def test_rows_join_and_leave_at_any_step_without_changing_one_another(
    bases: dict[str, Path], kernels: bool, plan: Plan
) -> None:
    bench = Bench(bases["gpt2"], slots=3, kernels=kernels, prefill_tokens=plan.prefill_tokens)
    mixes = four_mixes(bench)
    running = []
    cancels: dict[int, list[Any]] = {}
    for step in range(15):
        for at, prompt, mix, tokens, cancel in plan.rows:
            if at == step:
                row, client = bench.submit(
                    PROMPTS[prompt], mixes[mix], params(max_new_tokens=tokens)
                )
                running.append((prompt, mix, tokens, cancel, client))
                if cancel is not None:
                    cancels.setdefault(step + cancel, []).append(row)
        for row in cancels.get(step, []):
            row.cancelled = True
        if step in plan.folds:
            bench.engine.fold(bench.weights.prepare(mixes[plan.folds[step]]))
        bench.engine.step()
    bench.run()
    assert len(running) == len(plan.rows)
    for prompt, mix, tokens, cancel, client in running:
        assert client.ended
        expected = bench.alone(PROMPTS[prompt], mixes[mix])[:tokens]
        assert client.tokens == expected[: len(client.tokens)]
        if cancel is None:
            assert client.tokens == expected
    assert bench.engine.running == bench.engine.waiting == 0


def test_a_slot_that_is_used_again_does_not_leak_old_keys(bench: Bench) -> None:
    mix = bench.mix()
    # A long row fills a slot; a short one takes it, beside another whose window is wide.
    _, long = bench.submit(PROMPTS[2] * 4, mix, params(max_new_tokens=3))
    _, wide = bench.submit(PROMPTS[2] * 3, mix, params(max_new_tokens=30))
    while not long.ended:
        bench.engine.step()
    _, short = bench.submit(PROMPTS[1], mix)
    bench.run()
    assert short.tokens == bench.alone(PROMPTS[1], mix)
    assert wide.tokens == bench.alone(PROMPTS[2] * 3, mix, 30)


def test_a_row_that_moves_keeps_what_the_step_has_just_written(
    bases: dict[str, Path], kernels: bool
) -> None:
    bench = Bench(bases["gpt2"], slots=2, kernels=kernels)
    mix = bench.mix()
    # The first row ends, and the second takes its slot before it is handed its own token.
    _, first = bench.submit(PROMPTS[0], mix, params(max_new_tokens=2))
    _, moving = bench.submit(PROMPTS[2], mix, params(logprobs=True))
    bench.engine.step()
    assert not first.ended
    bench.engine.step()
    assert first.ended
    written = len(PROMPTS[2]) + 1  # the newest of its 2 tokens has not run yet
    for store in key_values(bench.model):
        assert bool(store[1, :, written - 1].any())
        assert torch.equal(store[0, :, :written], store[1, :, :written])
    bench.run()
    check_logprobs(bench, PROMPTS[2], mix, moving)


@pytest.mark.parametrize("budget", [8, 128])
def test_a_row_that_moves_in_the_pass_of_its_prompt_keeps_all_of_it(
    bases: dict[str, Path], kernels: bool, budget: int
) -> None:
    bench = Bench(bases["gpt2"], slots=2, kernels=kernels, prefill_tokens=budget)
    mix, prompt = bench.mix(), PROMPTS[2] * 3
    _, first = bench.submit(PROMPTS[0], mix, params(max_new_tokens=1))
    row, moving = bench.submit(prompt, mix, params(logprobs=True))
    bench.engine.step()
    assert first.ended
    assert list(bench.scheduler.running) == [row]
    assert row.decoding == (budget == 128)
    bench.run()
    check_logprobs(bench, prompt, mix, moving)


@pytest.mark.parametrize("budget", [4, 128])
def test_each_prompt_of_a_pass_has_its_head_corrected_by_its_own_mix(
    bases: dict[str, Path], kernels: bool, budget: int
) -> None:
    bench = Bench(bases["llama"], kernels=kernels, prefill_tokens=budget)
    names = ("lm_head", "model.layers.1.mlp.down_proj")
    one, two = (
        random_adapter(bench.layout, seed, modules=names, rank=seed + 1, size=0.2)
        for seed in (1, 2)
    )
    mixes = [
        bench.mix((one, 1.0)),
        bench.mix(),
        bench.mix((one, -0.8), (two, 0.5)),
        bench.mix((two, 1.0)),
    ]
    for resident in (bench.mix(), mixes[2]):
        bench.fold(resident)
        clients = [
            bench.submit(prompt, mix, params(logprobs=True))[1]
            for prompt, mix in zip(PROMPTS, mixes, strict=True)
        ]
        bench.run()
        for prompt, mix, client in zip(PROMPTS, mixes, clients, strict=True):
            assert client.tokens == bench.alone(prompt, mix)
            check_logprobs(bench, prompt, mix, client)


# No arithmetic where none is due.


@pytest.fixture
def corrected(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Grows by one entry, the rank, for each module that a pass corrects."""
    calls: list[int] = []
    dense, kernel = DenseCorrection.attach, KernelCorrection.attach

    def dense_counting(self: DenseCorrection, *arguments: Any) -> None:
        calls.extend([self.stack.ranks] * len(self.stack.a))
        dense(self, *arguments)

    def kernel_counting(self: KernelCorrection, *arguments: Any) -> None:
        tables = [kept for kept in self._kept if kept.dtype == torch.int64]
        calls.extend(int(table[:, 2].sum()) for table in tables)  # one a module
        kernel(self, *arguments)

    monkeypatch.setattr(DenseCorrection, "attach", dense_counting)
    monkeypatch.setattr(KernelCorrection, "attach", kernel_counting)
    return calls


def bare(model: nn.Module) -> bool:
    """True if no module of a model has anything to add to its product."""
    return not any(
        module._forward_hooks or (isinstance(module, PackedLinear) and bool(module.term.any()))
        for module in model.modules()
    )


def test_no_low_rank_arithmetic_when_every_row_asks_for_the_resident_mix(
    bench: Bench,
    adapters: tuple[Adapter, Adapter],
    corrected: list[int],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    mix = bench.mix((adapters[0], 0.5), (adapters[1], 1.0))
    # A corrected row leaves nothing behind.
    bench.submit(PROMPTS[0], mix)
    bench.run()
    assert corrected
    corrected.clear()
    bench.observer.steps.clear()
    bench.fold(mix)
    real = bench.model.run
    passes: list[bool] = []

    def watched(batch: Batch, keep: Tensor) -> Tensor:
        passes.append(bare(bench.model.module))
        return real(batch, keep)

    monkeypatch.setattr(bench.model, "run", watched)
    clients = [bench.submit(prompt, mix)[1] for prompt in PROMPTS]
    future = bench.engine.score([ScoreRow((1, 2, 3))], [mix])
    bench.run()
    assert all(client.reason is FinishReason.LENGTH for client in clients)
    assert future.done()
    assert corrected == []
    # Prompts, of which one is a single token and runs apart without the kernels; steps; texts.
    assert len(passes) == 1 + (not bench.model.packed) + (GREEDY.limit - 1) + 1
    assert all(passes)
    assert {rows for _, rows in bench.observer.steps} == {0}


def test_a_batch_computes_only_with_the_adapters_that_it_needs(
    bench: Bench, adapters: tuple[Adapter, Adapter], corrected: list[int]
) -> None:
    one, two = adapters
    bench.fold(bench.mix((one, 0.5)))
    bench.submit(PROMPTS[0], bench.mix((one, 0.5), (two, 1.0)))
    bench.run()
    assert set(corrected) == {two.rank}  # the gate of the other one is 0


def test_an_adapter_is_freed_once_nothing_refers_to_it(bench: Bench) -> None:
    adapter = random_adapter(bench.layout, 9)
    gone = weakref.ref(adapter)
    mix = bench.mix((adapter, 1.0))
    row, client = bench.submit(PROMPTS[0], mix)
    bench.engine.step()
    bench.fold(mix)
    del adapter, mix
    bench.fold(bench.mix())
    gc.collect()
    assert gone() is not None  # the row goes on with it
    bench.run()
    assert len(client.tokens) == GREEDY.max_new_tokens
    del row, client
    gc.collect()
    assert gone() is None


@pytest.mark.parametrize("ending", ["result", "error", "cancel"])
def test_a_score_frees_its_adapter_however_it_ends(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, ending: str
) -> None:
    adapter = random_adapter(bench.layout, 9)
    gone = weakref.ref(adapter)
    rows = [ScoreRow(tuple(range(60)))] * 12  # more than one slice
    future: Future[Any] | None = bench.engine.score(rows, [bench.mix((adapter, 1.0))] * len(rows))
    assert future is not None
    bench.engine.step()
    assert not future.done()
    if ending == "cancel":
        assert future.cancel()
    elif ending == "error":
        monkeypatch.setattr(bench.model, "run", broken("the model is gone"))
    for _ in range(len(rows)):  # each in a slice of its own, since two fill the context
        bench.engine.step()
    assert future.done()
    monkeypatch.undo()
    del adapter, future
    gc.collect()
    assert gone() is None


# Requests that end early.


def test_a_row_that_is_cancelled_leaves_at_the_next_step(bench: Bench) -> None:
    row, client = bench.submit(PROMPTS[0], bench.mix())
    bench.engine.step()
    row.cancelled = True
    bench.engine.step()
    assert client.reason is FinishReason.ABORTED
    assert client.tokens == bench.alone(PROMPTS[0], bench.mix())[:1]
    assert bench.scheduler.idle


def test_a_row_that_is_cancelled_while_it_waits_never_runs(bench: Bench) -> None:
    for prompt in PROMPTS:
        bench.submit(prompt, bench.mix())
    bench.engine.step()
    row, client = bench.submit(PROMPTS[0], bench.mix())
    bench.engine.step()
    assert bench.engine.waiting == 1
    row.cancelled = True
    bench.engine.step()
    assert (client.reason, client.tokens, client.text) == (FinishReason.ABORTED, [], "")
    assert bench.engine.waiting == 0
    assert bench.engine.running == 4


def test_a_full_queue_refuses_at_once(bases: dict[str, Path]) -> None:
    bench = Bench(bases["gpt2"], slots=1, max_queue=1)
    bench.submit(PROMPTS[0], bench.mix())
    bench.submit(PROMPTS[0], bench.mix())
    with pytest.raises(QueueFull):
        bench.submit(PROMPTS[0], bench.mix())
    bench.run()
    _, client = bench.submit(PROMPTS[0], bench.mix())
    bench.run()
    assert client.reason is FinishReason.LENGTH


# Faults.


def broken(message: str) -> Any:
    def raise_error(*_: object, **__: object) -> Any:
        raise RuntimeError(message)

    return raise_error


def test_a_failing_decode_fails_its_rows_and_the_engine_goes_on(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    clients = [bench.submit(prompt, bench.mix())[1] for prompt in PROMPTS[:2]]
    bench.engine.step()
    monkeypatch.setattr(bench.model, "run", broken("decode"))
    bench.engine.step()
    assert [str(client.error) for client in clients] == ["decode", "decode"]
    monkeypatch.undo()
    _, client = bench.submit(PROMPTS[0], bench.mix())
    bench.run()
    assert client.tokens == bench.alone(PROMPTS[0], bench.mix())


def test_a_failing_prefill_fails_the_rows_of_its_pass_alone(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, other = bench.submit(PROMPTS[1], bench.mix())
    bench.engine.step()
    real = bench.model.run

    def failing(batch: Batch, keep: Tensor) -> Tensor:
        if any(span.position == 0 for span in batch.spans):
            raise RuntimeError("prefill")
        return real(batch, keep)

    monkeypatch.setattr(bench.model, "run", failing)
    clients = [bench.submit(PROMPTS[i], bench.mix())[1] for i in (0, 3)]
    bench.engine.step()
    assert [str(client.error) for client in clients] == ["prefill"] * 2
    assert len(other.tokens) == 2
    monkeypatch.undo()
    bench.run()
    assert other.tokens == bench.alone(PROMPTS[1], bench.mix())


def test_only_what_fails_by_itself_ends_with_a_failing_pass(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, decoding = bench.submit(PROMPTS[1], bench.mix())
    bench.engine.step()
    real = bench.model.run
    bad = PROMPTS[2]

    def failing(batch: Batch, keep: Tensor) -> Tensor:
        result = real(batch, keep)
        if any(list(span.ids) == bad for span in batch.spans):
            for store in key_values(bench.model):
                store[batch.spans[-1].slot].fill_(torch.nan)  # where it broke off
            raise RuntimeError("this prompt")
        return result

    monkeypatch.setattr(bench.model, "run", failing)
    clients = [bench.submit(prompt, bench.mix())[1] for prompt in (PROMPTS[0], bad, PROMPTS[3])]
    bench.engine.step()
    assert [str(client.error) if client.error else None for client in clients] == [
        None,
        "this prompt",
        None,
    ]
    assert len(decoding.tokens) == 2
    assert bench.engine.running == 3
    monkeypatch.undo()
    bench.run()
    _, again = bench.submit(bad, bench.mix())
    bench.run()
    texts = zip(
        (decoding, clients[0], clients[2], again),
        (PROMPTS[1], PROMPTS[0], PROMPTS[3], bad),
        strict=True,
    )
    for client, prompt in texts:
        assert client.tokens == bench.alone(prompt, bench.mix())


def python_has_none() -> Any:
    return bytes(1 << 62)


def torch_has_none() -> Any:
    return torch.empty(1 << 50)


def the_device_has_none() -> Any:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")


@pytest.mark.parametrize("allocate", [python_has_none, torch_has_none, the_device_has_none])
def test_out_of_memory_in_a_step_fails_the_row_that_is_too_large_and_no_other(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, allocate: Callable[[], Any]
) -> None:
    """A step whose prompts together take what is not there is repeated in parts."""
    large = PROMPTS[2] * 4
    running = [bench.submit(prompt, bench.mix())[1] for prompt in PROMPTS[:2]]
    bench.engine.step()
    real = bench.model.run

    def run(batch: Batch, keep: Tensor) -> Tensor:
        if sum(len(span.ids) for span in batch.spans) >= len(large):
            allocate()
        return real(batch, keep)

    monkeypatch.setattr(bench.model, "run", run)
    _, too_large = bench.submit(large, bench.mix())
    _, beside = bench.submit(PROMPTS[3], bench.mix())
    bench.run()
    assert too_large.error is not None
    assert is_out_of_memory(too_large.error)
    for client, prompt in zip((*running, beside), (*PROMPTS[:2], PROMPTS[3]), strict=True):
        assert client.error is None
        assert client.tokens == bench.alone(prompt, bench.mix())
    monkeypatch.undo()
    _, again = bench.submit(large, bench.mix())
    bench.run()
    assert again.tokens == bench.alone(large, bench.mix())


def poison(mix: BoundMix, factor: str) -> None:
    """Make A or B of an adapter so large that its products overflow; the loader lets it pass."""
    factors = next(iter(mix.entries[0].adapter.modules.values()))
    getattr(factors, factor).fill_(3e38)


@pytest.mark.parametrize("factor", ["a", "b"])
def test_output_that_is_not_finite_fails_only_its_row(bench: Bench, factor: str) -> None:
    good = bench.mix((random_adapter(bench.layout, 1), 1.0))
    bad = bench.mix((random_adapter(bench.layout, 2), 1.0))
    poison(bad, factor)
    _, before = bench.submit(PROMPTS[0], good)
    row, during = bench.submit(PROMPTS[1], good)
    _, beside = bench.submit(PROMPTS[2], good)
    bench.engine.step()
    row.mix = bad  # In the midst of its text, as no request can.
    bench.run()
    assert isinstance(during.error, FailedPrecondition)
    assert during.error.reason == "OUTPUT_NOT_FINITE"
    assert len(during.tokens) == 1  # of the prompt
    assert before.tokens == bench.alone(PROMPTS[0], good)
    assert beside.tokens == bench.alone(PROMPTS[2], good)


def test_a_slot_that_held_nan_serves_the_next_row_well(
    bases: dict[str, Path], kernels: bool
) -> None:
    bench = Bench(bases["gpt2"], slots=2, kernels=kernels)
    bad = bench.mix((random_adapter(bench.layout, 2), 1.0))
    poison(bad, "a")
    # The wide row makes the batch read far beyond the end of the short one.
    _, wide = bench.submit(PROMPTS[2] * 4, bench.mix(), params(max_new_tokens=20))
    bench.engine.step()
    _, failed = bench.submit(PROMPTS[2] * 4, bad)
    bench.engine.step()
    assert failed.error is not None
    _, short = bench.submit(PROMPTS[1], bench.mix())
    bench.run()
    assert short.error is None
    assert short.tokens == bench.alone(PROMPTS[1], bench.mix())
    assert wide.tokens == bench.alone(PROMPTS[2] * 4, bench.mix(), 20)


@pytest.mark.parametrize("neighbour", ["broken too", "finishing"])
def test_a_broken_row_that_is_not_the_last_leaves_no_nan_behind(
    bases: dict[str, Path], neighbour: str, kernels: bool
) -> None:
    bench = Bench(bases["gpt2"], slots=3, kernels=kernels)
    bad = bench.mix((random_adapter(bench.layout, 2), 1.0))
    poison(bad, "a")
    _, wide = bench.submit(PROMPTS[2] * 4, bench.mix(), params(max_new_tokens=20))
    # The row in the middle leaves in the step in which the last one, moved into its place, breaks.
    middle, _ = bench.submit(PROMPTS[2] * 4, bench.mix(), params(max_new_tokens=2))
    end, last = bench.submit(PROMPTS[2] * 4, bench.mix())
    bench.engine.step()
    # In the midst of their texts, as no request can.
    end.mix = bad
    if neighbour == "broken too":
        middle.mix = bad
    bench.engine.step()
    assert isinstance(last.error, FailedPrecondition)
    shorts = [bench.submit(PROMPTS[1], bench.mix())[1] for _ in range(2)]
    bench.run()
    assert [short.tokens for short in shorts] == [bench.alone(PROMPTS[1], bench.mix())] * 2
    assert wide.tokens == bench.alone(PROMPTS[2] * 4, bench.mix(), 20)


def cached_values_are_finite(bench: Bench, slot: int) -> bool:
    stores = key_values(bench.model)
    return all(bool(torch.isfinite(store[slot]).all()) for store in stores)


def test_a_row_cancelled_in_the_middle_of_its_prompt_leaves_no_nan_behind(
    bases: dict[str, Path], kernels: bool
) -> None:
    bench = Bench(bases["gpt2"], slots=2, kernels=kernels, prefill_tokens=8)
    bad = bench.mix((random_adapter(bench.layout, 2), 1.0))
    poison(bad, "a")
    wide, client = bench.submit(PROMPTS[2] * 3, bench.mix(), params(max_new_tokens=20))
    while not wide.decoding:
        bench.engine.step()
    cancelled, told = bench.submit(PROMPTS[2] * 3, bad)
    bench.engine.step()
    assert cancelled.computed == 8
    assert not cached_values_are_finite(bench, 1)  # and no logits have told of it
    cancelled.cancelled = True
    bench.engine.step()
    assert (told.reason, told.error) == (FinishReason.ABORTED, None)
    _, short = bench.submit(PROMPTS[1], bench.mix())
    bench.engine.step()
    assert cached_values_are_finite(bench, 1)
    bench.run()
    assert short.error is None
    assert short.tokens == bench.alone(PROMPTS[1], bench.mix())
    assert client.tokens == bench.alone(PROMPTS[2] * 3, bench.mix(), 20)


@pytest.mark.parametrize("ending", ["cancelled", "broken"])
def test_a_row_moved_in_the_middle_of_its_prompt_leaves_no_nan_behind(
    bases: dict[str, Path], kernels: bool, ending: str
) -> None:
    bench = Bench(bases["gpt2"], slots=3, kernels=kernels, prefill_tokens=8)
    bad = bench.mix((random_adapter(bench.layout, 2), 1.0))
    poison(bad, "a")
    wide, client = bench.submit(PROMPTS[2] * 3, bench.mix(), params(max_new_tokens=30))
    while not wide.decoding:
        bench.engine.step()
    _, leaving = bench.submit(PROMPTS[1], bench.mix(), params(max_new_tokens=2))
    moving, told = bench.submit(PROMPTS[2] * 3, bad)
    while not leaving.ended:
        bench.engine.step()
    assert list(bench.scheduler.running) == [wide, moving]  # it wrote NaN in slot 2 first
    assert not moving.decoding
    moving.cancelled = ending == "cancelled"
    while not told.ended:
        bench.engine.step()
    shorts = [bench.submit(PROMPTS[1], bench.mix())[1] for _ in range(2)]
    bench.run()
    assert [short.error for short in shorts] == [None, None]
    assert [short.tokens for short in shorts] == [bench.alone(PROMPTS[1], bench.mix())] * 2
    assert client.tokens == bench.alone(PROMPTS[2] * 3, bench.mix(), 30)


def test_rows_that_end_at_once_do_not_keep_others_from_going_on(bench: Bench) -> None:
    _, long = bench.submit(PROMPTS[0], bench.mix(), params(max_new_tokens=8))

    def resubmit(chunk: Chunk) -> None:
        bench.engine.submit(dataclasses.replace(again, tokens=[], computed=0, ended=False))

    again, _ = bench.row(PROMPTS[1], bench.mix(), params(max_new_tokens=1))
    again.sink = resubmit
    bench.engine.submit(again)
    future = bench.engine.fold(bench.weights.prepare(bench.mix()))
    for _ in range(8):
        bench.engine.step()
    assert long.reason is FinishReason.LENGTH
    future.result(timeout=0)


@pytest.mark.parametrize(
    "event", [name for name in vars(EngineObserver) if not name.startswith("_")]
)
def test_an_observer_that_raises_harms_nobody(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, event: str
) -> None:
    monkeypatch.setattr(bench.observer, event, broken("the observer"), raising=False)
    bad = bench.mix((random_adapter(bench.layout, 2), 1.0))
    poison(bad, "a")
    _, failing = bench.submit(PROMPTS[1], bad)
    _, client = bench.submit(PROMPTS[0], bench.mix())
    bench.fold(bench.mix((random_adapter(bench.layout, 1), 1.0)))
    bench.run()
    assert client.tokens == bench.alone(PROMPTS[0], bench.mix())
    assert isinstance(failing.error, FailedPrecondition)


def test_a_device_that_fails_for_good_leaves_nobody_waiting(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bench.model, "run", broken("sticky"))
    for name in ("claim", "move"):
        monkeypatch.setattr(bench.model.cache, name, broken("sticky"))
    clients = [start_row(bench, 4) for _ in range(3)]
    bench.engine.start()
    for client in clients:
        wait_for(client)
        assert client.chunks[-1].error is not None
    later = start_row(bench, 4)
    wait_for(later)
    assert later.chunks[-1].error is not None
    bench.engine.drain(grace=10)
    bench.engine.stop()


def test_a_sink_that_raises_ends_its_own_row_only(bench: Bench) -> None:
    row, _ = bench.submit(PROMPTS[0], bench.mix())
    row.sink = broken("the client's loop is closed")
    _, other = bench.submit(PROMPTS[1], bench.mix())
    bench.engine.step()
    bench.engine.step()
    assert bench.engine.running == 1
    bench.run()
    assert other.tokens == bench.alone(PROMPTS[1], bench.mix())


def test_a_fold_that_fails_is_told_and_rows_go_on(
    bench: Bench, adapters: tuple[Adapter, Adapter], monkeypatch: pytest.MonkeyPatch
) -> None:
    old, new = bench.mix((adapters[0], 1.0)), bench.mix((adapters[1], 1.0))
    bench.fold(old)
    _, client = bench.submit(PROMPTS[0], new)
    bench.engine.step()
    prepared = bench.weights.prepare(new)
    for form in (PlainFormat, PackedFormat):
        monkeypatch.setattr(form, "fold", broken("no memory"))
    future = bench.engine.fold(prepared)
    bench.engine.step()
    monkeypatch.undo()
    with pytest.raises(Internal, match="the mix that was served before is served still"):
        future.result(timeout=0)
    bench.run()
    assert bench.observer.folds == [True, False]
    assert client.tokens == bench.alone(PROMPTS[0], new)


# How a text ends, and what is told of it.


@pytest.mark.parametrize("ending", ["length", "stop", "cancelled", "cancelled while waiting"])
def test_who_is_told_the_end_finds_the_slot_free(bench: Bench, ending: str) -> None:
    stop = bench.alone(PROMPTS[0], bench.mix())[1]
    options: dict[str, dict[str, Any]] = {
        "length": {"max_new_tokens": 2},
        "stop": {"stop_token_ids": (stop,)},
    }
    running: list[tuple[bool, int, int]] = []
    row, client = bench.row(PROMPTS[0], bench.mix(), params(**options.get(ending, {})))

    def sink(chunk: Chunk) -> None:
        client(chunk)
        running.append((chunk.last, bench.engine.running, bench.engine.waiting))

    row.sink = sink
    bench.engine.submit(row)
    if ending != "cancelled while waiting":
        bench.engine.step()
    row.cancelled = ending.startswith("cancelled")
    bench.engine.step()
    assert client.reason is {"length": FinishReason.LENGTH, "stop": FinishReason.STOP}.get(
        ending, FinishReason.ABORTED
    )
    assert running[-1] == (True, 0, 0)
    assert {slots for last, slots, _ in running if not last} <= {1}


def test_eos_ends_a_text_unless_it_is_ignored(bench: Bench) -> None:
    # Bias the output towards the end of text after some steps by choosing it as what comes third.
    expected = bench.alone(PROMPTS[0], bench.mix())
    bench.tokenizer.ends = frozenset({expected[2]})
    _, stopped = bench.submit(PROMPTS[0], bench.mix(), params(ignore_eos=False))
    _, ignoring = bench.submit(PROMPTS[0], bench.mix())
    bench.run()
    first = expected.index(expected[2])
    assert stopped.tokens == expected[: first + 1]
    assert stopped.reason is FinishReason.STOP
    assert ignoring.tokens == expected
    assert ignoring.reason is FinishReason.LENGTH


def test_stop_ids_end_a_text_and_min_new_tokens_forbids_them(bench: Bench) -> None:
    expected = bench.alone(PROMPTS[0], bench.mix())
    stop = expected[1]
    _, stopped = bench.submit(PROMPTS[0], bench.mix(), params(stop_token_ids=(stop,)))
    _, held = bench.submit(
        PROMPTS[0], bench.mix(), params(stop_token_ids=(stop,), min_new_tokens=6)
    )
    bench.run()
    assert stopped.tokens == expected[: expected.index(stop) + 1]
    assert stopped.reason is FinishReason.STOP
    assert stop not in held.tokens[:6]
    assert len(held.tokens) >= 6
    # transformers' own min_new_tokens forbids the same ids for as long.
    reference = bench.reference(bench.mix())
    ids = torch.tensor([PROMPTS[0]])
    text = reference.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=GREEDY.max_new_tokens,
        min_new_tokens=6,
        do_sample=False,
        eos_token_id=stop,
        pad_token_id=0,
    )
    assert held.tokens == text[0, len(PROMPTS[0]) :].tolist()


def test_logprobs_are_those_of_the_reference(bench: Bench) -> None:
    mixes = four_mixes(bench)
    bench.fold(mixes[2])
    asked = [
        bench.submit(p, m, params(logprobs=True))[1] for p, m in zip(PROMPTS, mixes, strict=True)
    ]
    # Sampled rows report the model's own log-probabilities, before temperature and top_k.
    warm = params(logprobs=True, temperature=2.0, top_k=5, seed=1)
    bench.run()
    _, sampled = bench.submit(PROMPTS[0], mixes[0], warm)
    _, silent = bench.submit(PROMPTS[0], mixes[0])
    bench.run()
    assert silent.logprobs == []
    for prompt, mix, client in [
        *zip(PROMPTS, mixes, asked, strict=True),
        (PROMPTS[0], mixes[0], sampled),
    ]:
        check_logprobs(bench, prompt, mix, client)


def test_the_same_seed_gives_the_same_text_whoever_shares_the_batch(bench: Bench) -> None:
    mixes = four_mixes(bench)
    hot = params(temperature=1.0, seed=7)
    _, alone = bench.submit(PROMPTS[0], mixes[0], hot)
    bench.run()
    bench.fold(mixes[2])
    for i in (1, 2, 3):
        bench.submit(PROMPTS[i], mixes[i], params(temperature=1.0, seed=i))
    bench.engine.step()
    _, shared = bench.submit(PROMPTS[0], mixes[0], hot)
    bench.run()
    assert shared.tokens == alone.tokens


def test_one_token_is_a_whole_text(bench: Bench) -> None:
    _, client = bench.submit(PROMPTS[0], bench.mix(), params(max_new_tokens=1))
    bench.engine.step()
    assert client.tokens == bench.alone(PROMPTS[0], bench.mix())[:1]
    assert client.reason is FinishReason.LENGTH


def test_a_row_may_fill_the_whole_context(bench: Bench) -> None:
    length = bench.model.context_length
    prompt = (PROMPTS[2] * length)[: length - 20]
    _, client = bench.submit(prompt, bench.mix(), params(max_new_tokens=20))
    bench.run()
    assert client.tokens == bench.alone(prompt, bench.mix(), 20)


# Scoring.


def test_scores_are_those_of_the_reference_and_restored_bit_for_bit(
    bench: Bench, adapters: tuple[Adapter, Adapter]
) -> None:
    mix = bench.mix((adapters[0], 1.0), (adapters[1], -0.5))
    rows = [ScoreRow(tuple(range(40))), ScoreRow((5, 6, 7, 8), first=2), ScoreRow((9,))]

    def score(mix: BoundMix) -> list[list[float]]:
        future = bench.engine.score(rows, [mix] * len(rows))
        while not future.done():
            bench.engine.step()
        return [row.logprobs for row in future.result(timeout=0).value]

    start = score(bench.mix())
    for resident in (bench.mix(), mix, bench.mix((adapters[1], 2.0))):
        bench.fold(resident)
        scores = score(mix)
        for row, found in zip(rows, scores, strict=True):
            ids = torch.tensor([row.ids])
            with torch.inference_mode():
                exact = bench.reference(mix)(ids).logits.log_softmax(-1)[0]
            expected = [float(exact[i - 1, row.ids[i]]) for i in range(row.first, len(row.ids))]
            assert found == pytest.approx(expected, abs=2e-4)
    bench.fold(bench.mix())
    assert score(bench.mix()) == start


def test_rows_go_on_between_the_slices_of_a_job(bench: Bench) -> None:
    _, client = bench.submit(PROMPTS[0], bench.mix())
    verification = bench.engine.verify()
    score = bench.engine.score([ScoreRow(tuple(range(60)))] * 20, [bench.mix()] * 20)
    counts = []
    while not (verification.done() and score.done()):
        bench.engine.step()
        counts.append(len(client.tokens))
    # A token at each step: the row's text was done long before the jobs.
    assert counts[:8] == list(range(1, 9))
    assert verification.result(timeout=0).value.ok
    assert verification.result(timeout=0).longest_stall_seconds > 0


def test_verification_between_folds_is_right(
    bench: Bench, adapters: tuple[Adapter, Adapter]
) -> None:
    future = bench.engine.verify()
    bench.engine.step()
    mix = bench.mix((adapters[0], 1.0))
    bench.fold(mix)
    while not future.done():
        bench.engine.step()
    assert future.result(timeout=0).value.ok
    assert future.result(timeout=0).value.mix == mix


# The thread.


@pytest.mark.parametrize("end", ["a fault", "given up"])
def test_damage_is_told_even_if_the_check_that_found_it_does_not_come_to_its_end(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, end: str
) -> None:
    """Or nobody would mend it, and every request would end with DATA_LOSS until the next check."""
    monkeypatch.setattr(pace, "_SLICE_BYTES", 1)
    told: list[str] = []
    monkeypatch.setattr(bench.observer, "weights_lost", lambda: told.append("lost"))
    flip_bit(next(bench.model.module.parameters()), 0)
    verification = bench.engine.verify()
    while bench.weights.intact:
        bench.engine.step()
    assert not told  # It goes on, and tells at its end.
    if end == "given up":
        verification.cancel()
    else:
        monkeypatch.setattr(bench.weights, "_is_base_whole", broken("no memory"))
    while bench.engine._jobs:
        bench.engine.step()
    assert told == ["lost"]


def test_a_check_of_what_rows_are_corrected_by_lets_them_go_on_after_each_module(
    bench: Bench, adapters: tuple[Adapter, Adapter], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A large adapter's factors are hundreds of MiB."""
    monkeypatch.setattr(pace, "_SLICE_BYTES", 1)
    bench.submit(PROMPTS[0], bench.mix((adapters[0], 1.0), (adapters[1], 0.5)))
    bench.engine.step()
    slices = bench.engine.runner._corrections.check(adapters)
    assert sum(1 for _ in slices) == sum(len(adapter.modules) for adapter in adapters)


def test_a_check_that_was_there_before_the_damage_does_not_undo_what_another_has_found(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pace, "_SLICE_BYTES", 1)
    first = next(bench.model.module.parameters())
    early = bench.engine.check()
    for _ in range(3):
        bench.engine.step()
    flip_bit(first, 0)
    late = bench.engine.check()
    while not early.done():
        bench.engine.step()
    assert early.result().value.ok
    assert not bench.weights.intact
    while not late.done():
        bench.engine.step()
    assert not late.result().value.ok
    flip_bit(first, 0)
    again = bench.engine.check()
    while not again.done():
        bench.engine.step()
    assert bench.weights.intact


def wait_for(client: Any) -> None:
    """Wait for the end of a row that the engine's thread runs."""
    client.done.result(timeout=60)


class Waiting:
    """A sink that another thread can wait on."""

    def __init__(self) -> None:
        self.chunks: list[Any] = []
        self.first: Future[None] = Future()
        self.done: Future[None] = Future()

    def __call__(self, chunk: Any) -> None:
        self.chunks.append(chunk)
        if len(self.chunks) == 1:
            self.first.set_result(None)
        if chunk.last:
            self.done.set_result(None)


def start_row(bench: Bench, tokens: int) -> Waiting:
    waiting = Waiting()
    row, _ = bench.row(PROMPTS[0], bench.mix(), params(max_new_tokens=tokens))
    row.sink = waiting
    bench.engine.submit(row)
    return waiting


def test_drain_lets_rows_end_and_takes_no_more(bench: Bench) -> None:
    bench.engine.start()
    client = start_row(bench, 12)
    bench.engine.drain(grace=60)
    wait_for(client)
    assert client.chunks[-1].finish_reason is FinishReason.LENGTH
    with pytest.raises(ShuttingDown):
        start_row(bench, 1)
    bench.engine.stop()
    with pytest.raises(ShuttingDown):
        bench.engine.verify()
    with pytest.raises(ShuttingDown):
        bench.engine.fold(bench.weights.prepare(bench.mix()))


def test_drain_aborts_what_is_not_done_when_grace_is_over(
    bases: dict[str, Path], kernels: bool
) -> None:
    bench = Bench(bases["gpt2"], slots=1, kernels=kernels)
    running, waiting = start_row(bench, 60), start_row(bench, 60)
    job = bench.engine.score([ScoreRow(tuple(range(60)))] * 500, [bench.mix()] * 500)
    bench.engine.start()
    running.first.result(timeout=60)
    bench.engine.drain(grace=0)
    for client in (running, waiting):
        wait_for(client)
    assert running.chunks[-1].finish_reason is FinishReason.ABORTED
    assert isinstance(
        waiting.chunks[-1].error, ShuttingDown
    )  # it never ran: no answer, not an empty one
    with pytest.raises(ShuttingDown):
        job.result(timeout=60)
    bench.engine.stop()


def test_stop_ends_everything_that_waits(bench: Bench) -> None:
    client = start_row(bench, 60)
    job = bench.engine.verify()
    fold = bench.engine.fold(bench.weights.prepare(bench.mix()))
    bench.engine._stopping = True
    bench.engine.start()
    bench.engine.stop()
    wait_for(client)
    assert isinstance(client.chunks[-1].error, ShuttingDown)
    for future in (job, fold):
        with pytest.raises(ShuttingDown):
            future.result(timeout=0)
    # A row that came now would never be told anything.
    with pytest.raises(ShuttingDown):
        start_row(bench, 1)


def test_a_fault_of_the_engine_itself_leaves_no_row_hanging(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    fault = broken("a fault of ours")
    client = start_row(bench, 12)
    monkeypatch.setattr(bench.engine, "_run_rows", fault)
    bench.engine.start()
    wait_for(client)
    # Not `aborted`, which would pass for an answer.
    assert str(client.chunks[-1].error) == "a fault of ours"
    monkeypatch.undo()
    after = start_row(bench, 12)
    wait_for(after)
    assert after.chunks[-1].finish_reason is FinishReason.LENGTH
    bench.engine.stop()


def test_an_engine_that_cannot_even_end_its_rows_leaves_no_job_and_no_fold_hanging(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Or the server would wait for ever for the operator's thread, which waits for the fold."""
    start_row(bench, 12)
    prepared = bench.weights.prepare(bench.mix())
    futures: list[Future[Any]] = [bench.engine.check(), bench.engine.verify()]
    futures.append(bench.engine.fold(prepared))
    monkeypatch.setattr(bench.engine, "_end_rows", broken("the fault of a fault's handling"))
    monkeypatch.setattr(bench.engine, "step", broken("a fault of ours"))
    bench.engine.start()
    for future in futures:
        assert future.exception(timeout=60) is not None
    bench.engine.drain(grace=3600)  # The row is there still, and will be.
    bench.engine.stop()
    with pytest.raises(ShuttingDown):
        bench.engine.fold(prepared)


def test_a_fault_in_the_middle_of_a_prompt_leaves_no_nan_behind(
    bases: dict[str, Path], kernels: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench = Bench(bases["gpt2"], slots=2, kernels=kernels, prefill_tokens=8)
    bad = bench.mix((random_adapter(bench.layout, 2), 1.0))
    poison(bad, "a")
    clients = [bench.submit(PROMPTS[2] * 3, mix)[1] for mix in (bad, bench.mix())]
    bench.engine.step()
    assert not cached_values_are_finite(bench, 0)
    bench.engine._end_all(RuntimeError("a fault of ours"))  # as the loop does after a step failed
    assert [str(client.error) for client in clients] == ["a fault of ours"] * 2
    # Beside a long row, so that a step reads far beyond the end of the short one.
    short, wide = (bench.submit(prompt, bench.mix())[1] for prompt in (PROMPTS[1], PROMPTS[2] * 4))
    bench.run()
    assert (short.error, wide.error) == (None, None)
    assert short.tokens == bench.alone(PROMPTS[1], bench.mix())
    assert wide.tokens == bench.alone(PROMPTS[2] * 4, bench.mix())

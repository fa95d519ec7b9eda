"""Captured decode steps, here "captured" on a CPU: the bookkeeping without CUDA."""

from __future__ import annotations

import itertools
from itertools import combinations
from pathlib import Path

import pytest
import torch
from tests.makers import save_base, tiny_llama
from tests.server.helpers import (
    Bench,
    bound,
    dense_model,
    key_values,
    load_reference,
    open_model,
    open_weights,
    random_adapter,
    run_base,
)
from torch import Tensor

from superpose_server.engine.runner import Runner
from superpose_server.engine.score import ScoreRow
from superpose_server.model.batch import Batch, Span
from superpose_server.model.graphs import CaptureError, DecodeGraphs, Step
from superpose_server.model.model import Model

ROWS, LENGTH = 5, 300
ROW_BUCKETS, LENGTH_BUCKETS = (1, 2, 4, 5), (128, 256, 300)


class Captured:
    """Graphs of a model on the CPU, and the buckets of the steps that ran, as (rows, length)."""

    def __init__(self, model: Model) -> None:
        self.captures = 0
        self.ran: list[tuple[int, int]] = []

        def forward(batch: Batch, keep: Tensor) -> Tensor:
            self.ran.append((len(batch.ids), batch.spans[0].end))
            return model.run(batch, keep)

        def capture(step: Step) -> Step:
            self.captures += 1
            step()
            return step

        with torch.inference_mode():
            self.graphs = DecodeGraphs(
                forward,
                rows=model.max_batch,
                length=model.context_length,
                scratch_slot=model.scratch_slot,
                device=model.device,
                capture=capture,
            )
        self.at_capture = self.ran
        self.ran = []

    def run(self, spans: list[Span]) -> Tensor:
        self.ran.clear()
        with torch.inference_mode():
            return self.graphs.run(spans)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_base(tiny_llama(n_positions=LENGTH), tmp_path_factory.mktemp("long"))


@pytest.fixture
def model(folder: Path) -> Model:
    return open_model(folder, max_batch=ROWS)


def prompt_of(slot: int, length: int) -> list[int]:
    generator = torch.Generator().manual_seed(slot)
    ids: list[int] = torch.randint(0, 256, (length,), generator=generator).tolist()
    return ids


def fill(model: Model, lengths: dict[int, int]) -> None:
    for slot, length in lengths.items():
        run_base(model, [Span(slot, prompt_of(slot, length), 0)], [length - 1])


# Positions that a step writes, at the edges of the lengths' buckets.
LAST = {0: 127, 1: 128, 2: 255, 3: 256, 4: 299}


def test_all_buckets_are_captured_the_largest_first(model: Model) -> None:
    captured = Captured(model)
    buckets = [(n, m) for n in ROW_BUCKETS for m in LENGTH_BUCKETS]
    assert captured.captures == len(buckets)
    assert captured.at_capture == buckets[::-1]


def test_rows_in_any_slots_and_of_any_length_run_as_uncaptured(model: Model) -> None:
    captured = Captured(model)
    used = set()
    for shift in range(ROWS):
        last = {(slot + shift) % ROWS: position for slot, position in LAST.items()}
        fill(model, last)
        for count in range(1, ROWS + 1):
            for slots in combinations(range(ROWS), count):
                spans = [Span(slot, (slot + 10,), last[slot]) for slot in slots]
                assert captured.graphs.can_run(spans, range(count))
                expected = run_base(model, spans, range(count))
                found = captured.run(spans)
                assert found.dtype == torch.float32
                assert torch.allclose(found, expected, rtol=0, atol=1e-5)
                rows = min(n for n in ROW_BUCKETS if n > max(slots))
                length = min(m for m in LENGTH_BUCKETS if m > max(last[slot] for slot in slots))
                assert captured.ran == [(rows, length)]
                used.add((rows, length))
    assert len(used) == len(ROW_BUCKETS) * len(LENGTH_BUCKETS)


def test_captured_steps_are_those_of_the_model(model: Model, folder: Path) -> None:
    captured = Captured(model)
    fill(model, {1: 127, 3: 20})
    reference = load_reference(folder).double()
    texts = {1: prompt_of(1, 127), 3: prompt_of(3, 20)}
    # Over the edge of a bucket, without slots 0 and 2.
    for step in range(3):
        spans = [Span(slot, (65 + step + slot,), len(text)) for slot, text in texts.items()]
        found = captured.run(spans)
        for row, (span, text) in enumerate(zip(spans, texts.values(), strict=True)):
            text.extend(span.ids)
            exact = reference(torch.tensor([text])).logits[0, -1]
            assert torch.allclose(found[row].double(), exact, rtol=0, atol=1e-4)
        assert captured.ran == [(4, 128 if step == 0 else 256)]


def test_rows_that_fill_a_bucket_write_to_the_scratch_slot_alone(model: Model) -> None:
    captured = Captured(model)
    fill(model, LAST)
    stores = key_values(model)
    before = [store.clone() for store in stores]
    captured.run([Span(2, (7,), 40)])  # a bucket of 4 rows, of which 3 are nobody
    for store, kept in zip(stores, before, strict=True):
        changed = (store != kept).any(dim=(1, 3))  # (slots, positions)
        changed[model.scratch_slot] = False
        assert changed.nonzero().tolist() == [[2, 40]]


def test_what_is_not_finite_elsewhere_stays_there(model: Model) -> None:
    captured = Captured(model)
    fill(model, LAST)
    spans = [Span(0, (5,), 30), Span(2, (6,), 50)]
    expected = captured.run(spans)
    with torch.inference_mode():
        for store in key_values(model):
            store[[1, 3, 4, model.scratch_slot]] = torch.nan
    assert torch.equal(captured.run(spans), expected)


def test_only_whole_decode_steps_are_replayed(model: Model) -> None:
    graphs = Captured(model).graphs
    one, two = Span(0, (1,), 5), Span(3, (2,), 9)
    assert graphs.can_run([one, two], range(2))
    assert not graphs.can_run([one, Span(3, (1, 2), 9)], [0, 2])  # a prompt
    assert not graphs.can_run([Span(0, (1, 2), 0)], [1])
    assert not graphs.can_run([one, Span(model.scratch_slot, (1,), 9)], range(2))
    assert not graphs.can_run([one, Span(3, (1,), 9, start=4)], range(2))
    assert not graphs.can_run([one, two], [1])
    assert not graphs.can_run([one], [])


def test_a_fold_writes_under_captured_steps(model: Model, folder: Path) -> None:
    captured = Captured(model)
    weights = open_weights(model)
    mix = bound((random_adapter(model.layout, 1, size=0.1), 1.0))
    span = Span(0, (9,), 0)
    before = captured.run([span])
    weights.fold(weights.prepare(mix))
    folded = captured.run([span])
    exact = dense_model(load_reference(folder), mix, model.layout)(torch.tensor([[9]])).logits[0]
    assert torch.allclose(folded.double(), exact, rtol=0, atol=1e-4)
    assert float((folded - before).abs().max()) > 0.1
    weights.fold(weights.prepare(bound()))
    assert torch.equal(captured.run([span]), before)


class Passes:
    """Lets a bench capture its decode steps, on the CPU, and notes the buckets that are replayed.

    Attributes:
        ran: (rows, length, whether a term was added) of each replay.
    """

    def __init__(self, bench: Bench) -> None:
        self.ran: list[tuple[int, int, bool]] = []
        model = bench.model
        seen: list[tuple[int, int, bool]] = []
        real = model.run

        def run(batch: Batch, keep: Tensor) -> Tensor:
            hooked = any(module._forward_hooks for module in model.module.modules())
            seen[:] = [(len(batch.ids), batch.spans[0].end, hooked)]
            return real(batch, keep)

        def capture(step: Step) -> Step:
            step()

            def replay() -> Tensor:
                result = step()
                self.ran += seen
                return result

            return replay

        model.run = run  # type: ignore[method-assign]
        model.capturable = True
        bench.engine.runner = Runner(model, bench.weights, capture=lambda: capture)


def captured_bench(folder: Path, prefill_tokens: int = 128) -> tuple[Bench, Passes]:
    bench = Bench(folder, prefill_tokens=prefill_tokens)
    return bench, Passes(bench)


def test_an_engine_on_captured_steps_gives_the_same_texts(base: Path) -> None:
    bench, captured = captured_bench(base, prefill_tokens=4)
    one = random_adapter(bench.layout, 1)
    mixes = [bench.mix(), bench.mix((one, 1.0)), bench.mix((one, -0.5))]
    prompts = [[72, 101, 108], [65], [10, 20, 30, 40, 50, 60, 70]]
    # One after the other and side by side; corrected, folded, and as the base.
    for resident in mixes[:2]:
        bench.fold(resident)
        for together in ([0], [0, 0, 0], [0, 1, 2], [1, 1]):
            clients = [
                bench.submit(prompt, mixes[i])[1]
                for prompt, i in zip(prompts, together, strict=False)
            ]
            bench.run()
            for client, prompt, i in zip(clients, prompts, together, strict=False):
                assert client.tokens == bench.alone(prompt, mixes[i])
    assert {hooked for _, _, hooked in captured.ran} == {False, True}


def test_more_ranks_than_captured_steps_have_room_for_run_uncaptured(base: Path) -> None:
    bench, captured = captured_bench(base)
    wide = [random_adapter(bench.layout, seed, rank=32, size=0.02) for seed in range(5)]
    all_of_them = bench.mix(*((adapter, 0.2) for adapter in wide))
    # Batches that fit, which take the place of one another, and one that does not.
    for mixes, fits in (
        ([bench.mix((adapter, 1.0)) for adapter in wide[:4]], True),
        ([all_of_them, bench.mix()], False),
        ([bench.mix((adapter, 1.0)) for adapter in wide[2:]], True),
    ):
        captured.ran.clear()
        clients = [bench.submit([72, 101], mix)[1] for mix in mixes]
        bench.run()
        for client, mix in zip(clients, mixes, strict=True):
            assert client.tokens == bench.alone([72, 101], mix)
        assert {hooked for _, _, hooked in captured.ran} == ({True} if fits else set())


def test_an_adapted_head_runs_uncaptured(bases: dict[str, Path]) -> None:
    bench, captured = captured_bench(bases["llama"])
    head = random_adapter(bench.layout, 3, modules=("lm_head",))
    _, client = bench.submit([72, 101], bench.mix((head, 1.0)))
    bench.run()
    assert client.tokens == bench.alone([72, 101], bench.mix((head, 1.0)))
    assert captured.ran == []


def test_a_text_that_is_scored_meanwhile_keeps_its_keys(bases: dict[str, Path]) -> None:
    # The text takes several slices, and steps in between have rows that only fill a bucket.
    bench, captured = captured_bench(bases["llama"], prefill_tokens=8)
    mix = bench.mix()
    ids = prompt_of(0, 40)
    clients = [bench.submit([65 + i], mix)[1] for i in range(3)]
    bench.engine.step()
    future = bench.engine.score([ScoreRow(tuple(ids))], [mix])
    while not future.done():
        bench.engine.step()
    assert not any(client.ended and client.error for client in clients)
    assert (4, 64, False) in captured.ran
    logits = bench.pristine.double()(torch.tensor([ids])).logits[0, :-1]
    exact = logits.log_softmax(-1).gather(1, torch.tensor(ids[1:])[:, None])[:, 0]
    found = torch.tensor(future.result().value[0].logprobs, dtype=torch.float64)
    assert torch.allclose(found, exact, rtol=0, atol=1e-4)


def test_a_step_that_cannot_be_captured_runs_uncaptured_and_the_log_says_so(
    base: Path, caplog: pytest.LogCaptureFixture
) -> None:
    bench = Bench(base)
    bench.model.capturable = True
    captures = itertools.count()

    def capture(step: Step) -> Step:
        # Some buckets are captured before one is not.
        if next(captures) == 2:
            raise CaptureError("it waits for the device")
        return step

    bench.engine.runner = Runner(bench.model, bench.weights, capture=lambda: capture)
    assert next(captures) == 3
    [record] = caplog.records
    assert "cannot be captured" in record.message
    assert "it waits for the device" in record.message
    mixes = [bench.mix(), bench.mix((random_adapter(bench.layout, 1), 1.0))]
    clients = [bench.submit([72, 101], mix)[1] for mix in mixes]
    bench.run()
    for client, mix in zip(clients, mixes, strict=True):
        assert client.tokens == bench.alone([72, 101], mix)


def test_memory_that_runs_out_in_a_capture_is_no_reason_to_do_without(base: Path) -> None:
    bench = Bench(base)
    bench.model.capturable = True

    def capture(step: Step) -> Step:
        raise torch.OutOfMemoryError("no memory, says the test")

    with pytest.raises(torch.OutOfMemoryError):
        Runner(bench.model, bench.weights, capture=lambda: capture)

"""The compiled forward pass: compiled once, for any batch, and over live parameters."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
import torch
from tests.makers import VOCABULARY, save_base, tiny_llama
from tests.server.helpers import (
    GREEDY,
    Bench,
    bound,
    dense_model,
    load_reference,
    open_model,
    open_weights,
    random_adapter,
    run_base,
)
from torch import Tensor

from superpose_adapters.mix import BoundMix
from superpose_server.engine.score import ScoreRow
from superpose_server.model.batch import Span
from superpose_server.model.model import Model

pytestmark = [
    pytest.mark.skipif(not (shutil.which("c++") or shutil.which("g++")), reason="no C++ compiler"),
    # torch's compiler still imports what torch deprecates.
    pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning"),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    # One layer, since the time is the compiler's.
    return save_base(tiny_llama(num_hidden_layers=1), tmp_path_factory.mktemp("compiled"))


@pytest.fixture(scope="module")
def bench(folder: Path) -> Bench:
    return Bench(folder, kernels=True, graphs=True, prefill_tokens=16)


@pytest.fixture(scope="module")
def uncompiled(folder: Path) -> Model:
    return open_model(folder, kernels=True)


def graphs() -> dict[str, int]:
    return dict(torch._dynamo.utils.counters["stats"])


@pytest.fixture(autouse=True)
def never_again(bench: Bench) -> Iterator[None]:
    """No test compiles anything after the model was loaded, nor falls back to what is not."""
    before = graphs()
    assert before["unique_graphs"] >= 1
    calls = torch._dynamo.utils.counters["frames"]["total"]
    with torch._dynamo.config.patch(error_on_recompile=True):
        yield
    assert graphs() == before
    assert torch._dynamo.utils.counters["frames"]["total"] == calls


@pytest.fixture(autouse=True)
def at_the_base(bench: Bench, never_again: None) -> Iterator[None]:
    yield
    bench.weights.fold(bench.weights.prepare(bench.mix()))


TEXTS = [[72, 101, 108, 108, 111], [65], [10, 20, 30], [200, 3, 7, 9, 11, 13, 17]]


def decode(model: Model, tokens: Sequence[tuple[int, int, int]]) -> Tensor:
    """A step of (slot, token, position)."""
    spans = [Span(slot, (token,), position) for slot, token, position in tokens]
    return run_base(model, spans, range(len(spans)))


def prefill(model: Model) -> None:
    for slot, ids in enumerate(TEXTS):
        run_base(model, [Span(slot, ids, 0)], [len(ids) - 1])


def test_batches_of_any_size_run_on_one_graph(bench: Bench, uncompiled: Model) -> None:
    for model in (bench.model, uncompiled):
        prefill(model)
    for rows in (1, 2, 3, 4):
        for start in range(3):
            step = [(slot, 65 + start, len(TEXTS[slot]) + start) for slot in range(rows)]
            found, expected = decode(bench.model, step), decode(uncompiled, step)
            assert found.shape == (rows, VOCABULARY)
            assert torch.allclose(found, expected, rtol=0, atol=1e-5)
    for count in (1, 2, 3, 17, 60):
        for wanted in ([count - 1], [], list(range(count)), list(range(0, count, 2))):
            span = [Span(bench.model.scratch_slot, tuple(range(count)), 0)]
            found = run_base(bench.model, span, wanted)
            assert found.shape == (len(wanted), VOCABULARY)
            assert torch.allclose(found, run_base(uncompiled, span, wanted), rtol=0, atol=1e-5)


def test_logits_are_those_of_the_model(bench: Bench, folder: Path) -> None:
    reference = load_reference(folder).double()
    for ids in TEXTS:
        exact = reference(torch.tensor([ids])).logits[0]
        found = run_base(bench.model, [Span(0, ids, 0)], range(len(ids)))
        assert torch.allclose(found.double(), exact, rtol=0, atol=1e-4)


def test_a_row_has_the_same_bits_alone_and_in_any_batch(bench: Bench) -> None:
    mix = bench.mix((random_adapter(bench.layout, 1), 1.0))
    bench.fold(mix)
    prefill(bench.model)
    step = [(slot, 65 + slot, len(ids)) for slot, ids in enumerate(TEXTS)]
    together = decode(bench.model, step)
    for slot in range(4):
        assert torch.equal(decode(bench.model, step[slot : slot + 1])[0], together[slot])
    assert torch.equal(decode(bench.model, step[1:3]), together[1:3])
    # As the end of a text in one pass, and of one of two texts.
    text = [*TEXTS[0], 65]
    whole = run_base(bench.model, [Span(3, text, 0)], [5])
    assert torch.equal(whole[0], together[0])
    both = run_base(bench.model, [Span(2, TEXTS[3], 0), Span(3, text, 0)], [12])
    assert torch.equal(both[0], together[0])


def logprobs(bench: Bench, prompts: list[list[int]], mix: BoundMix) -> list[list[float]]:
    asked = dataclasses.replace(GREEDY, logprobs=True)
    clients = [bench.submit(prompt, mix, asked)[1] for prompt in prompts]
    bench.run()
    return [client.logprobs for client in clients]


def test_served_logprobs_have_the_same_bits_alone_and_in_a_batch_of_four(bench: Bench) -> None:
    mix = bench.mix((random_adapter(bench.layout, 1), 0.5))
    bench.fold(mix)
    alone = [logprobs(bench, [prompt], mix)[0] for prompt in TEXTS]
    assert logprobs(bench, TEXTS, mix) == alone
    assert logprobs(bench, TEXTS[::-1], mix) == alone[::-1]
    scored = [bench.engine.score([ScoreRow(tuple(ids))], [mix]) for ids in TEXTS]
    packed = bench.engine.score([ScoreRow(tuple(ids)) for ids in TEXTS], [mix] * len(TEXTS))
    for _ in range(10):
        bench.engine.step()
    assert [f.result(timeout=0).value[0] for f in scored] == packed.result(timeout=0).value


def test_a_fold_changes_what_was_compiled_before(
    bench: Bench, uncompiled: Model, folder: Path
) -> None:
    other = open_weights(uncompiled)
    adapter = random_adapter(bench.layout, 1, size=0.2)
    ids = TEXTS[3]
    span = [Span(0, ids, 0)]
    base = run_base(bench.model, span, range(len(ids)))
    for weight in (1.0, -0.5, 0.0):
        mix = bound((adapter, weight)) if weight else bound()
        bench.weights.fold(bench.weights.prepare(mix))
        other.fold(other.prepare(mix))
        found = run_base(bench.model, span, range(len(ids)))
        assert torch.allclose(found, run_base(uncompiled, span, range(len(ids))), rtol=0, atol=1e-5)
        exact = dense_model(load_reference(folder), mix, bench.layout)(torch.tensor([ids]))
        assert torch.allclose(found.double(), exact.logits[0], rtol=0, atol=2e-4)
        if weight:
            assert float((found - base).abs().max()) > 0.1
    assert torch.equal(found, base)


def test_served_texts_of_four_mixes_and_scores_beside_them(bench: Bench) -> None:
    one, two = random_adapter(bench.layout, 1), random_adapter(bench.layout, 2, rank=7)
    head = random_adapter(bench.layout, 3, modules=("lm_head",))
    mixes = [
        bench.mix((one, 1.0)),
        bench.mix(),
        bench.mix((one, -0.8), (two, 0.5)),
        bench.mix((head, 1.0)),
    ]
    clients = [bench.submit(TEXTS[0], mix)[1] for mix in mixes]
    ids = tuple(range(3, 60, 2))
    future = bench.engine.score([ScoreRow(ids), ScoreRow((1, 2, 3))], [mixes[2]] * 2)
    for resident in (*mixes, bench.mix()):
        bench.fold(resident)
    bench.run()
    assert [client.tokens for client in clients] == [bench.alone(TEXTS[0], mix) for mix in mixes]
    logits = bench.reference(mixes[2])(torch.tensor([ids])).logits[0, :-1]
    exact = logits.log_softmax(-1).gather(1, torch.tensor(ids[1:])[:, None])[:, 0]
    found = torch.tensor(future.result(timeout=0).value[0].logprobs, dtype=torch.float64)
    assert torch.allclose(found, exact, rtol=0, atol=2e-4)
    # And one row alone, corrected: the batches that are smallest.
    for mix in mixes:
        _, client = bench.submit([65], mix)
        bench.run()
        assert client.tokens == bench.alone([65], mix)

"""On a GPU: the same meaning as on a CPU, with everything resident there and decode steps captured.

`TEST_DEVICE=cuda pytest tests/integration` runs the tests through a socket on a GPU too.
"""

from __future__ import annotations

import dataclasses
import random
from itertools import permutations
from pathlib import Path

import pytest
import torch
from tests.families import measure
from tests.server.helpers import (
    GREEDY,
    SAMPLING_KINDS,
    Bench,
    dense_weights,
    key_values,
    random_adapter,
)

from superpose_adapters.adapter import Adapter
from superpose_adapters.digest import hash_bytes
from superpose_server.engine.choosing import choose
from superpose_server.engine.runner import Runner
from superpose_server.engine.score import ScoreRow
from superpose_server.model.batch import Span

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
PROMPT = [72, 101, 108]


def captured(
    folder: Path,
    dtype: torch.dtype = torch.float32,
    prefill_tokens: int = 128,
    slots: int = 4,
) -> Bench:
    return Bench(
        folder,
        dtype=dtype,
        device="cuda",
        kernels=True,
        graphs=True,
        prefill_tokens=prefill_tokens,
        slots=slots,
    )


@pytest.mark.parametrize("graphs", [False, True], ids=["uncaptured", "captured"])
def test_four_mixes_at_once_with_everything_on_the_gpu(base: Path, graphs: bool) -> None:
    bench = Bench(base, device="cuda", kernels=graphs, graphs=graphs)
    one, two = random_adapter(bench.layout, 1), random_adapter(bench.layout, 2, rank=2)
    mixes = [
        bench.mix((one, 1.0)),
        bench.mix(),
        bench.mix((one, -0.8), (two, 0.5)),
        bench.mix((two, 1.0)),
    ]
    clients = [bench.submit(PROMPT, mix)[1] for mix in mixes]
    for resident in mixes:
        bench.fold(resident)
        prepared = bench.weights.resident
        tensors = [
            *bench.model.module.parameters(),
            *bench.weights._base.values(),
            *(factor for pair in prepared.factors.values() for factor in pair),
            *key_values(bench.model),
        ]
        assert {tensor.device.type for tensor in tensors} == {"cuda"}
    bench.run()
    assert [c.tokens for c in clients] == [bench.alone(PROMPT, mix) for mix in mixes]
    verification = bench.engine.verify()
    while not verification.done():
        bench.engine.step()
    assert verification.result(timeout=0).value.ok


def test_rows_that_share_the_resident_mix_run_captured(base: Path) -> None:
    bench = captured(base, prefill_tokens=4)
    one = random_adapter(bench.layout, 1)
    prompts = [PROMPT, [65], [10, 20, 30, 40, 50, 60, 70]]
    for mix in (bench.mix((one, 0.7)), bench.mix()):
        bench.fold(mix)
        clients = [bench.submit(prompt, mix)[1] for prompt in prompts]
        bench.run()
        assert [c.tokens for c in clients] == [bench.alone(prompt, mix) for prompt in prompts]


@DTYPES
def test_captured_steps_are_those_that_are_not(base: Path, dtype: torch.dtype) -> None:
    bench = captured(base, dtype, slots=5)
    runner = bench.engine.runner
    one, two = random_adapter(bench.layout, 1), random_adapter(bench.layout, 2, rank=2)
    corrected = [bench.mix((one, 1.0)), bench.mix((two, -0.5)), bench.mix((one, 0.3), (two, 1.0))]
    generator = torch.Generator().manual_seed(0)
    lengths = {0: 1, 1: 20, 2: 33, 3: 62, 4: 5}
    for slot, length in lengths.items():
        ids = torch.randint(0, 256, (length,), generator=generator).tolist()
        runner.run([Span(slot, ids, 0)], [length - 1], [bench.mix()])
    # Rounding to the dtype happens elsewhere in another kernel.
    tolerance = {torch.float32: 1e-4, torch.bfloat16: 0.3, torch.float16: 0.05}[dtype]
    bench.model.capturable = False
    uncaptured = Runner(bench.model, bench.weights)
    for mixes in ([bench.mix()] * 5, [*corrected, bench.mix(), corrected[0]]):
        for slots in ([0], [3], [1, 4], [0, 2, 3], [0, 1, 2, 3, 4], [4, 0]):
            spans = [Span(slot, (slot + 10,), lengths[slot]) for slot in slots]
            wanted, asked = range(len(slots)), [mixes[slot] for slot in slots]
            found = runner.run(spans, wanted, asked)
            exact = uncaptured.run(spans, wanted, asked)
            assert torch.allclose(found, exact, rtol=0, atol=tolerance)


@pytest.mark.parametrize("kind", SAMPLING_KINDS)
def test_tokens_are_those_of_a_cpu(kind: str) -> None:
    rows = 64
    logits = 3 * torch.randn(rows, 50257, generator=torch.Generator().manual_seed(0))
    bias = dict.fromkeys(range(0, 50257, 100), 3.0)
    params = [
        dataclasses.replace(SAMPLING_KINDS[kind], logit_bias=bias, repetition_penalty=1.0 + row % 2)
        for row in range(rows)
    ]

    def tokens(device: str) -> list[int]:
        found, finite = choose(
            logits.to(device),
            params,
            [random.Random(row) for row in range(rows)],
            [frozenset({row}) for row in range(rows)],
            [each.history(range(row)) for row, each in enumerate(params)],
        )
        assert all(finite)
        return found

    assert tokens("cuda") == tokens("cpu")


@DTYPES
def test_weights_are_a_function_of_the_mix_and_removal_is_exact(
    base: Path, dtype: torch.dtype
) -> None:
    bench = captured(base, dtype)
    parameters = dict(bench.model.module.named_parameters())
    addresses = {name: p.data_ptr() for name, p in parameters.items()}
    pristine = {name: hash_bytes(p) for name, p in parameters.items()}
    adapters = [random_adapter(bench.layout, seed, size=0.3) for seed in range(3)]
    found = set()
    for order in permutations(adapters):
        held: list[tuple[Adapter, float]] = []
        for adapter in order:
            held.append((adapter, 0.5))
            bench.fold(bench.mix(*held))
        found.add(tuple(hash_bytes(p) for p in parameters.values()))
        bench.fold(bench.mix())
        assert {name: hash_bytes(p) for name, p in parameters.items()} == pristine
    assert len(found) == 1
    mix = bench.mix(*((adapter, 0.5) for adapter in adapters))
    bench.fold(mix)
    assert bench.weights.resident.mix == mix
    exact = dense_weights(dict(bench.pristine.named_parameters()), mix, bench.layout)
    for name, parameter in parameters.items():
        # One rounding to the dtype, after float32 arithmetic.
        error = (parameter.cpu().double() - exact[name]).abs()
        bound = exact[name].abs() * torch.finfo(dtype).eps + 1e-6
        assert bool((error <= bound).all()), name
    assert {name: p.data_ptr() for name, p in parameters.items()} == addresses


def test_a_base_that_is_kept_on_the_host_folds_the_same_bits(base: Path) -> None:
    benches = [
        Bench(base, dtype=torch.bfloat16, device="cuda", on_host=host) for host in (False, True)
    ]
    one = random_adapter(benches[0].layout, 1, size=0.3)
    for bench in benches:
        bench.fold(bench.mix((one, 1.0)))
    here, host = ({n: hash_bytes(p) for n, p in b.model.module.named_parameters()} for b in benches)
    assert here == host
    assert {tensor.device.type for tensor in benches[1].weights._base.values()} == {"cpu"}


@pytest.mark.parametrize("resident", [False, True])
def test_scores_are_those_of_the_dense_sum(base: Path, resident: bool) -> None:
    bench = captured(base, prefill_tokens=7)
    mix = bench.mix((random_adapter(bench.layout, 1), -0.6), (random_adapter(bench.layout, 2), 1.0))
    if resident:
        bench.fold(mix)
    rows = [ScoreRow(tuple(range(60, 60 + length))) for length in (2, 20, 40)]
    _, client = bench.submit(PROMPT, mix)
    future = bench.engine.score(rows, [mix] * len(rows))
    while not future.done():
        bench.engine.step()
    bench.run()
    assert client.tokens == bench.alone(PROMPT, mix)
    reference = bench.reference(mix)
    for found, scored in zip(future.result(timeout=0).value, rows, strict=True):
        logits = reference(torch.tensor([scored.ids])).logits[0, :-1].log_softmax(-1)
        exact = logits.gather(1, torch.tensor(scored.ids[1:])[:, None])[:, 0]
        assert torch.allclose(torch.tensor(found.logprobs).double(), exact, rtol=0, atol=2e-4)


def test_a_seed_draws_the_same_text_in_any_company(base: Path) -> None:
    bench = captured(base)
    params = dataclasses.replace(GREEDY, temperature=0.9, top_k=20, top_p=0.9, seed=7)
    texts = []
    for company in (0, 3):
        for number in range(company):
            bench.submit([30 + number], bench.mix(), GREEDY)
        _, client = bench.submit(PROMPT, bench.mix(), params)
        bench.run()
        texts.append(client.tokens)
    assert texts[0] == texts[1]


@pytest.mark.parametrize("name", ["mistral", "gemma2", "gpt_oss", "phi3/longrope", "bloom"])
def test_windows_caps_sinks_and_rows_alone(name: str, tmp_path: Path) -> None:
    outcome = measure(name, tmp_path, kernels=True, graphs=True, device="cuda")
    assert set(outcome.worst) == {"base", "corrected", "folded", "texts"}, outcome.verdict
    assert max(outcome.worst.values()) < 1e-3

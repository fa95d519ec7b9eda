"""Frequencies that depend on a text's length: each row has its own, whoever shares the batch."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.makers import tiny_llama
from tests.server.helpers import (
    GREEDY,
    NEEDS_COMPILER,
    Bench,
    Client,
    generate,
    open_model,
    run_base,
)
from tests.server.kinds import Exact, ids_of, save_tiny, score, three_mixes
from tests.zoo import build
from torch import Tensor

from superpose_server.engine.sampling import SamplingParams
from superpose_server.engine.score import ScoreRow
from superpose_server.engine.twin_check import check_meaning
from superpose_server.model.batch import BEYOND, Batch, Span
from superpose_server.model.passes import Way
from superpose_server.model.rope import fix_frequencies

CPU = torch.device("cpu")
SWITCH = 24
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "short_factor": [1.0, 1.5, 2.0, 2.5],
    "long_factor": [2.0, 3.0, 4.0, 5.0],
    "original_max_position_embeddings": SWITCH,
}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {"num_key_value_heads": 2},
    "phi3": {"num_key_value_heads": 2, "original_max_position_embeddings": SWITCH},
}


def fields(family: str) -> dict[str, Any]:
    # A configuration keeps, and changes, the dictionary that it is given.
    return {**FAMILIES[family], "rope_parameters": copy.deepcopy(LONGROPE)}


def greedy(tokens: int) -> SamplingParams:
    return dataclasses.replace(GREEDY, max_new_tokens=tokens, logprobs=True)


@pytest.fixture(scope="module", params=["llama", "phi3"])
def longrope(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp(request.param), request.param, **fields(request.param))


@pytest.fixture
def make(longrope: Path, kernels: bool) -> Callable[..., Bench]:
    def made(**options: Any) -> Bench:
        bench = Bench(longrope, kernels=kernels, **options)
        # As `runtime.py` gives it.
        assert bench.scheduler._switch == bench.model.switch == SWITCH
        assert bench.model.way is Way.SHARED
        return bench

    return made


def test_the_two_sets_of_frequencies_show(make: Callable[..., Bench]) -> None:
    exact = Exact(make(), growing=True)
    text = ids_of(0, SWITCH + 1)
    short, long = (exact(exact.bench.mix(), text[:end]) for end in (SWITCH, SWITCH + 1))
    assert float((short - long[:SWITCH]).abs().max()) > 0.1


# (prompt, new tokens, mix): texts that stay within, cross within the answer at once, after a while
# and with their first token, and prompts that are beyond from the start.
ROWS = [
    (5, 12, 0),
    (10, 30, 1),
    (SWITCH - 1, 6, 2),
    (SWITCH, 6, 0),
    (SWITCH + 1, 6, 1),
    (40, 9, 2),
    (SWITCH - 2, 12, 1),
]


@pytest.mark.parametrize("budget", [1, 8, 256])
def test_every_token_is_what_one_uncached_pass_over_the_text_so_far_says(
    make: Callable[..., Bench], budget: int
) -> None:
    bench = make(slots=3, max_queue=9, prefill_tokens=budget)
    mixes = three_mixes(bench)
    told = [
        (
            ids_of(i, prompt),
            tokens,
            mixes[mix],
            bench.submit(ids_of(i, prompt), mixes[mix], params)[1],
        )
        for i, (prompt, tokens, mix) in enumerate(ROWS)
        for params in [greedy(tokens)]
    ]
    for resident in (1, 2, 0):
        bench.engine.step()
        bench.fold(mixes[resident])
    bench.run(limit=600)
    exact = Exact(bench, growing=True)
    for prompt, tokens, mix, client in told:
        exact.check_text(prompt, mix, client, tokens)


def test_a_row_is_the_same_alone_and_beside_a_longer_or_a_shorter_text(
    make: Callable[..., Bench],
) -> None:
    def text(*others: tuple[int, int]) -> Client:
        bench = make(prefill_tokens=9)
        clients = [bench.submit(ids_of(9, n), bench.mix(), greedy(new))[1] for n, new in others]
        for _ in range(3 if others else 0):
            bench.engine.step()
        _, client = bench.submit(ids_of(1, 18), bench.mix(), greedy(16))
        bench.run()
        assert all(client.ended for client in clients)
        return client

    alone = text()
    for others in ([(40, 20)], [(3, 12)], [(20, 30), (50, 3)]):
        beside = text(*others)
        assert beside.tokens == alone.tokens
        # The same bits on packed parameters; torch sums by the shapes of a batch.
        assert beside.logprobs == pytest.approx(alone.logprobs, abs=1e-4)


def test_greedy_texts_are_those_that_phi3_generates(tmp_path: Path, kernels: bool) -> None:
    """Phi-3 alone drops its cache in `generate` when its text crosses the switch-over length."""
    folder = save_tiny(tmp_path, "phi3", **fields("phi3"))
    bench = Bench(folder, kernels=kernels, prefill_tokens=8)
    prompts = [ids_of(i, n) for i, n in enumerate((10, SWITCH, 30))]
    clients = [bench.submit(prompt, bench.mix(), greedy(25))[1] for prompt in prompts]
    bench.run()
    for prompt, client in zip(prompts, clients, strict=True):
        assert client.tokens == generate(bench.reference(bench.mix()), prompt, 25)


@pytest.mark.parametrize("budget", [5, 64])
def test_a_scored_text_has_the_frequencies_of_the_whole_of_it_in_every_slice(
    make: Callable[..., Bench], budget: int
) -> None:
    bench = make(prefill_tokens=budget)
    mix = three_mixes(bench)[2]
    lengths = (SWITCH - 1, SWITCH, SWITCH + 1, 50, 4, 60, 2)
    rows = [ScoreRow(tuple(ids_of(i, n))) for i, n in enumerate(lengths)]
    _, client = bench.submit(ids_of(8, 20), bench.mix(), greedy(20))
    Exact(bench).check_scores(score(bench, rows, mix), rows, mix)
    bench.run()
    Exact(bench, growing=True).check_text(ids_of(8, 20), bench.mix(), client, 20)


@pytest.mark.parametrize("budget", [8, 17])
def test_a_prompt_beyond_the_length_in_pieces(make: Callable[..., Bench], budget: int) -> None:
    bench = make(prefill_tokens=budget)
    _, beside = bench.submit(ids_of(2, 6), bench.mix(), greedy(40))
    bench.engine.step()
    prompt = ids_of(3, 47)
    _, client = bench.submit(prompt, bench.mix(), greedy(4))
    bench.run()
    exact = Exact(bench, growing=True)
    exact.check_text(prompt, bench.mix(), client, 4)
    exact.check_text(ids_of(2, 6), bench.mix(), beside, 40)


@pytest.mark.parametrize("ending", ["cancelled", "failed"])
def test_a_row_that_ends_amid_its_second_run_leaves_nothing_behind(
    make: Callable[..., Bench], ending: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench = make(slots=2, prefill_tokens=5)
    row, client = bench.submit(ids_of(0, SWITCH - 3), bench.mix(), greedy(20))
    _, stays = bench.submit(ids_of(1, 8), bench.mix(), greedy(40))
    while row.length <= SWITCH or row.decoding:
        bench.engine.step()
    bench.engine.step()
    assert 0 < row.computed < SWITCH
    assert not row.decoding
    if ending == "cancelled":
        row.cancelled = True
        bench.engine.step()
    else:
        # What runs in pieces now fails; rows that decode do not.
        real = bench.model.run

        def run(batch: Batch, keep: Tensor) -> Tensor:
            if any(not span.decodes for span in batch.spans):
                raise RuntimeError("a fault of the pass")
            return real(batch, keep)

        monkeypatch.setattr(bench.model, "run", run)
        bench.engine.step()
        monkeypatch.undo()
        assert client.error is not None
    assert client.ended
    _, later = bench.submit(ids_of(2, 22), bench.mix(), greedy(10))
    bench.run()
    exact = Exact(bench, growing=True)
    exact.check_text(ids_of(1, 8), bench.mix(), stays, 40)
    exact.check_text(ids_of(2, 22), bench.mix(), later, 10)


def test_a_row_amid_its_second_run_is_moved_to_another_slot(make: Callable[..., Bench]) -> None:
    bench = make(slots=2, prefill_tokens=4)
    leaving, _ = bench.submit(ids_of(1, 3), bench.mix(), greedy(40))
    row, client = bench.submit(ids_of(0, SWITCH - 1), bench.mix(), greedy(12))
    while row.length <= SWITCH or row.computed not in range(1, SWITCH - 4):
        bench.engine.step()
    leaving.cancelled = True
    bench.engine.step()
    assert list(bench.scheduler.running) == [row]
    _, later = bench.submit(ids_of(4, 2), bench.mix(), greedy(30))
    bench.run()
    exact = Exact(bench, growing=True)
    exact.check_text(ids_of(0, SWITCH - 1), bench.mix(), client, 12)
    exact.check_text(ids_of(4, 2), bench.mix(), later, 30)


def test_positions_say_which_texts_are_beyond() -> None:
    spans = [
        Span(0, (1, 2), 0, whole=SWITCH),
        Span(1, (1, 2), 0, whole=SWITCH + 1),
        Span(2, (1,), SWITCH),
        Span(3, (1,), SWITCH + 4, start=SWITCH + 3),  # a short text behind others
    ]
    batch = Batch.of(spans, CPU, SWITCH)
    assert batch.positions.tolist() == [0, 1, BEYOND, BEYOND + 1, BEYOND + SWITCH, 1]
    assert batch.written.tolist() == [0, 1, 0, 1, SWITCH, SWITCH + 4]
    assert Batch.of(spans, CPU).positions.tolist() == [0, 1, 0, 1, SWITCH, 1]


def test_a_class_that_scales_by_the_longest_position_does_so_a_row(tmp_path: Path) -> None:
    """PhiMoE, whose rotary embedding has a scale for each side beside the frequencies."""
    rope = LONGROPE | {"short_mscale": 0.8, "long_mscale": 1.6}
    more: dict[str, Any] = {
        "num_local_experts": 4,
        "sliding_window": None,
        "num_key_value_heads": 2,
    }
    folder = save_tiny(tmp_path, "phimoe", rope_parameters=rope, **more)
    bench = Bench(folder, prefill_tokens=8)
    assert bench.model.switch == SWITCH
    told = []
    for i, (prompt, tokens) in enumerate([(10, 8), (30, 8), (SWITCH - 2, 8)]):
        _, client = bench.submit(ids_of(i, prompt), bench.mix(), greedy(tokens))
        told.append((ids_of(i, prompt), tokens, client))
    bench.run()
    exact = Exact(bench, growing=True)
    for ids, tokens, client in told:
        exact.check_text(ids, bench.mix(), client, tokens)
    check_meaning(type(bench.pristine), bench.pristine.config, CPU, kernels=False)


@NEEDS_COMPILER
@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")
def test_the_compiled_pass_has_windows_and_both_sets_of_frequencies(tmp_path: Path) -> None:
    # One layer, since the time is the compiler's.
    folder = save_tiny(tmp_path, "phi3", num_hidden_layers=1, sliding_window=9, **fields("phi3"))
    bench = Bench(folder, kernels=True, graphs=True, prefill_tokens=8)
    mixes = three_mixes(bench)
    told = []
    for i, (prompt, tokens) in enumerate([(SWITCH - 4, 12), (40, 5), (7, 9)]):
        _, client = bench.submit(ids_of(i, prompt), mixes[i], greedy(tokens))
        told.append((ids_of(i, prompt), tokens, mixes[i], client))
    bench.run()
    exact = Exact(bench, growing=True)
    for ids, tokens, mix, client in told:
        exact.check_text(ids, mix, client, tokens)


# Dynamic NTK: texts within the base's own length only.


@pytest.fixture(scope="module")
def dynamic(tmp_path_factory: pytest.TempPathFactory) -> Path:
    rope = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0}
    folder = tmp_path_factory.mktemp("dynamic")
    return save_tiny(folder, "llama", rope_parameters=rope, max_position_embeddings=64)


def test_dynamic_frequencies_stay_those_of_the_length_that_no_row_exceeds(
    dynamic: Path, kernels: bool
) -> None:
    bench = Bench(dynamic, kernels=kernels, prefill_tokens=13)
    assert bench.model.switch is None
    length = bench.model.context_length
    assert length == 64  # its max_position_embeddings
    told = []
    for i, (prompt, tokens) in enumerate([(length - 9, 9), (5, length - 5), (20, 10)]):
        _, client = bench.submit(ids_of(i, prompt), bench.mix(), greedy(tokens))
        told.append((ids_of(i, prompt), tokens, client))
    bench.run()
    exact = Exact(bench)
    for ids, tokens, client in told:
        exact.check_text(ids, bench.mix(), client, tokens)


def test_a_dynamic_base_takes_no_longer_rows_than_its_own(dynamic: Path) -> None:
    with pytest.raises(ValueError, match="max_length is 65: this base takes 2 to 64"):
        open_model(dynamic, max_length=65)
    assert open_model(dynamic, max_length=64).context_length == 64


# What is found in a model.


def test_plain_frequencies_are_left_alone() -> None:
    module = tiny_llama()
    before = module.model.rotary_emb
    assert fix_frequencies(module) is None
    assert module.model.rotary_emb is before


def test_frequencies_of_several_kinds_that_depend_on_the_batch_are_refused() -> None:
    module = tiny_llama()
    for kind in ("dynamic", "longrope"):
        rope: Any = module.model.rotary_emb
        rope.rope_type = {"full_attention": "default", "sliding_attention": kind}
        with pytest.raises(ValueError, match=r"rotary_emb.*would depend on who shares a batch"):
            fix_frequencies(module)


@pytest.mark.parametrize("length", [SWITCH, SWITCH + 1, 50])
def test_the_replacement_gives_transformers_angles(length: int) -> None:
    plain = build("llama", **fields("llama"))
    switched = copy.deepcopy(plain)
    assert fix_frequencies(switched) == SWITCH
    x = torch.zeros(1, length, 32)
    places = torch.arange(length)[None]
    mine = places + (BEYOND if length > SWITCH else 0)
    for found, exact in zip(
        switched.model.rotary_emb(x, mine), plain.model.rotary_emb(x, places), strict=True
    ):
        assert torch.equal(found, exact)


def test_logits_of_a_batch_of_both_sides(make: Callable[..., Bench]) -> None:
    bench = make()
    exact = Exact(bench)
    texts = [ids_of(0, 30), ids_of(1, 10), ids_of(2, SWITCH)]
    spans = [Span(slot, text, 0) for slot, text in enumerate(texts)]
    found = run_base(bench.model, spans, range(sum(map(len, texts)))).log_softmax(-1)
    expected = torch.cat([exact(bench.mix(), text) for text in texts])
    assert torch.allclose(found.double(), expected, atol=5e-4)

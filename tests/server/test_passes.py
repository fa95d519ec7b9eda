"""Bases whose rows share passes with windows, run a row a pass, or whole: against transformers."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tests.server.helpers import GREEDY, NEEDS_COMPILER, Bench, generate, open_model
from tests.server.kinds import Exact, ids_of, save_tiny, score, three_mixes
from torch import Tensor, nn
from transformers import DynamicCache
from transformers.models.llama.modeling_llama import LlamaMLP

from superpose_adapters.mix import BoundMix
from superpose_server.engine.sampling import SamplingParams
from superpose_server.engine.score import ScoreRow
from superpose_server.model.attention import window_of
from superpose_server.model.batch import Batch, Span
from superpose_server.model.cache import SlotCache, TokenStore
from superpose_server.model.model import Model
from superpose_server.model.passes import Way, whole_pass


def greedy(tokens: int) -> SamplingParams:
    return dataclasses.replace(GREEDY, max_new_tokens=tokens, logprobs=True)


# Windows, in passes that rows share.

WINDOW, LONG = 16, 224
# (step, prompt, new tokens, mix): streams join and leave, the shortest in the middle of others.
STREAMS = [
    (0, 120, 80, 0),
    (0, 7, 12, 1),
    (0, 33, 150, 2),
    (2, WINDOW, 5, 0),
    (4, 61, 70, 1),
    (9, WINDOW + 1, 100, 0),
    (11, 150, 50, 2),
]


@pytest.fixture(scope="module")
def mistral(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(
        tmp_path_factory.mktemp("mistral"),
        "mistral",
        num_key_value_heads=2,
        head_dim=8,
        sliding_window=WINDOW,
        max_position_embeddings=LONG,
    )


@pytest.mark.parametrize("budget", [23, 256])
def test_texts_much_longer_than_the_window_are_those_of_transformers(
    mistral: Path, kernels: bool, budget: int
) -> None:
    bench = Bench(mistral, slots=3, max_queue=8, kernels=kernels, prefill_tokens=budget)
    assert bench.model.way is Way.SHARED
    attentions = [m for m in bench.model.module.modules() if hasattr(m, "superpose_window")]
    assert [window_of(module) for module in attentions] == [WINDOW] * 2
    mixes = three_mixes(bench)
    told = []
    for step in range(12):
        for i, (at, prompt, tokens, mix) in enumerate(STREAMS):
            if at == step:
                _, client = bench.submit(ids_of(i, prompt), mixes[mix], greedy(tokens))
                told.append((ids_of(i, prompt), tokens, mixes[mix], client))
        if step == 6:
            bench.fold(mixes[1])  # others are corrected from now on
        bench.engine.step()
    bench.run(limit=1000)
    exact = Exact(bench)
    for ids, tokens, asked, client in told:
        exact.check_text(ids, asked, client, tokens)


@pytest.mark.parametrize("mix", [0, 2])
def test_a_text_of_200_tokens_is_what_transformers_generates_with_its_own_sliding_cache(
    mistral: Path, kernels: bool, mix: int
) -> None:
    bench = Bench(mistral, slots=2, kernels=kernels, prefill_tokens=17)
    asked = three_mixes(bench)[mix]
    prompt = ids_of(5, 40)
    _, client = bench.submit(prompt, asked, greedy(160))
    _, other = bench.submit(ids_of(6, 3), bench.mix(), greedy(20))
    bench.run(limit=300)
    reference = bench.reference(asked)
    reference.set_attn_implementation("eager")
    assert client.tokens == generate(reference, prompt, 160)
    assert len(set(client.tokens)) > 20  # no loop, which would hide what is read
    assert len(other.tokens) == 20


def test_the_window_shows(mistral: Path) -> None:
    """What is behind it changes nothing in the first layer, and what is in it does."""
    exact = Exact(Bench(mistral))
    # Two layers see back over two windows.
    far = 2 * (WINDOW - 1)
    text = ids_of(0, far + 20)
    for changed, differs in ((19 - 1, False), (19, True)):
        other = [*text[:changed], (text[changed] + 1) % 250, *text[changed + 1 :]]
        last = [exact(BoundMix("base"), ids)[-1] for ids in (text, other)]
        assert torch.equal(*last) is not differs


# Rows alone, with the base's own attention.

ROWS: dict[str, tuple[str, dict[str, Any]]] = {
    "bloom": ("bloom", {}),
    "gptj": ("gptj", {"rotary_dim": 4}),
    "gpt_neo": ("gpt_neo", {"attention_types": [[["global", "local"], 1]], "window_size": 6}),
    "falcon-new": ("falcon", {"new_decoder_architecture": True, "num_kv_heads": 2}),
    "falcon-multi-query": ("falcon", {"multi_query": True, "alibi": False}),
    "falcon-alibi": (
        "falcon",
        {"multi_query": False, "num_kv_heads": 4, "alibi": True, "bias": True},
    ),
    "mpt": ("mpt", {}),
    "codegen": ("codegen", {"rotary_dim": 4}),
    "xglm": ("xglm", {"pad_token_id": 1}),
    "biogpt": ("biogpt", {"pad_token_id": 1}),
}
WHOLE = ("openai-gpt", {"n_ctx": 64})


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("alone")
    kinds = {**ROWS, "openai-gpt": WHOLE}
    return {
        name: save_tiny(root / name, model_type, **fields)
        for name, (model_type, fields) in kinds.items()
    }


@pytest.fixture(params=[*ROWS, "openai-gpt"])
def bench(request: pytest.FixtureRequest, folders: dict[str, Path]) -> Bench:
    return Bench(folders[request.param], slots=3, kernels=False, prefill_tokens=5)


def test_rows_under_different_mixes_in_pieces_and_moved_slots(bench: Bench) -> None:
    mixes = three_mixes(bench)
    exact = Exact(bench)
    told = []
    # The first leaves while the last one is still in its prompt, and is moved into its slot.
    for i, (prompt, tokens, mix) in enumerate([(3, 2, 1), (11, 9, 0), (26, 6, 2), (8, 8, 1)]):
        _, client = bench.submit(ids_of(i, prompt), mixes[mix], greedy(tokens))
        told.append((ids_of(i, prompt), tokens, mixes[mix], client))
    for resident in (1, 0, 2):
        bench.fold(mixes[resident])
    bench.run()
    for ids, tokens, asked, client in told:
        exact.check_text(ids, asked, client, tokens)
    texts = [bench.submit(ids_of(1, 11), asked, greedy(9))[1] for asked in mixes]
    bench.run()
    assert len({tuple(client.tokens) for client in texts}) == 3  # mixes show


def test_short_texts_are_scored_behind_each_other_and_long_ones_in_slices(bench: Bench) -> None:
    mixes = three_mixes(bench)
    exact = Exact(bench)
    _, client = bench.submit(ids_of(9, 12), mixes[0], greedy(20))
    rows = [
        ScoreRow(tuple(ids_of(0, 4))),
        ScoreRow(tuple(ids_of(1, 3)), first=2),
        ScoreRow(tuple(ids_of(2, 33)), first=7),
        ScoreRow(tuple(ids_of(3, 2))),
        ScoreRow(tuple(ids_of(4, 40))),  # the slot begins anew
        ScoreRow(tuple(ids_of(5, 7))),
    ]
    for mix in (mixes[2], mixes[0]):
        exact.check_scores(score(bench, rows, mix), rows, mix)
    bench.run()
    exact.check_text(ids_of(9, 12), mixes[0], client, 20)


def test_the_way_is_what_the_base_allows(folders: dict[str, Path]) -> None:
    for name, folder in folders.items():
        model = open_model(folder, max_batch=2, kernels=False)
        whole = name == "openai-gpt"
        assert model.way is (Way.WHOLE if whole else Way.ROWS), name
        assert isinstance(model.cache, TokenStore if whole else SlotCache)
        assert not model.packed


@NEEDS_COMPILER
def test_kernels_that_do_not_apply_are_left_alone(folders: dict[str, Path]) -> None:
    bench = Bench(folders["gptj"], kernels=True, graphs=True)
    assert (bench.model.way, bench.model.packed) == (Way.ROWS, False)
    _, client = bench.submit(ids_of(0, 6), bench.mix(), greedy(4))
    bench.run()
    Exact(bench).check_text(ids_of(0, 6), bench.mix(), client, 4)


def test_a_row_that_leaves_leaves_nothing_to_the_next(folders: dict[str, Path]) -> None:
    for name in ("bloom", "openai-gpt"):
        bench = Bench(folders[name], slots=2, prefill_tokens=4)
        gone, left = bench.submit(ids_of(0, 30), bench.mix())
        _, stays = bench.submit(ids_of(1, 9), bench.mix(), greedy(5))
        bench.engine.step()
        gone.cancelled = True
        _, later = bench.submit(ids_of(2, 3), bench.mix(), greedy(5))
        bench.run()
        assert left.tokens == []
        exact = Exact(bench)
        exact.check_text(ids_of(1, 9), bench.mix(), stays, 5)
        exact.check_text(ids_of(2, 3), bench.mix(), later, 5)


def test_a_row_alone_sees_what_transformers_own_cache_would_show_it() -> None:
    """Also where it begins behind another in its slot."""
    for start in (0, 6):
        slots, own = SlotCache(2, 20), DynamicCache()
        done = 0
        for count in (4, 1, 3, 1):
            batch = Batch.of([Span(1, (0,) * count, start + done, start)], torch.device("cpu"))
            row = slots.row(batch)
            assert row.get_query_offset() == done
            for layer in range(2):
                assert row.get_seq_length(layer) == own.get_seq_length(layer) == done
                assert row.get_mask_sizes(count, layer) == own.get_mask_sizes(count, layer)
                keys, values = torch.randn(2, 1, 3, count, 5)
                found, expected = (cache.update(keys, values, layer) for cache in (row, own))
                assert all(torch.equal(*pair) for pair in zip(found, expected, strict=True))
                assert row.get_seq_length(layer) == own.get_seq_length(layer) == done + count
            done += count


def test_what_is_no_key_or_value_is_named_when_a_base_asks_for_it() -> None:
    row = SlotCache(1, 4).row(Batch.of([Span(0, (0,), 0)], torch.device("cpu")))
    with pytest.raises(AttributeError, match="it asks its cache for conv_states, which no"):
        _ = row.conv_states
    assert not hasattr(row, "ssm_states")


class Echo(nn.Module):
    """A base of an old interface: it gives all logits, which say what it was called with."""

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Any:
        assert attention_mask.shape == input_ids.shape
        return SimpleNamespace(logits=(input_ids * attention_mask)[..., None].half())


def test_a_base_that_gives_all_logits_gives_those_that_are_wanted() -> None:
    batch = Batch.of([Span(0, (7, 8, 9, 10), 0)], torch.device("cpu"))
    for wanted in ([], [1], [0, 2], [3, 0]):
        keep = torch.tensor(wanted, dtype=torch.int64)
        found = whole_pass(Echo(), None, batch, keep)
        assert found.dtype == torch.float32
        assert found[:, 0].tolist() == [7.0 + place for place in wanted]


# What cannot be compiled whole.


@NEEDS_COMPILER
@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")
def test_a_base_whose_layers_break_the_graph_is_refused_with_the_way_out(
    bases: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    real = LlamaMLP.forward

    def breaking(self: Any, x: Tensor) -> Tensor:
        torch._dynamo.graph_break()
        result: Tensor = real(self, x)
        return result

    monkeypatch.setattr(LlamaMLP, "forward", breaking)
    with pytest.raises(ValueError, match="compiled as a whole: pass --compile off") as caught:
        open_model(bases["llama"], kernels=True, graphs=True)
    assert "\n" not in str(caught.value)
    # With that flag it is served.
    assert isinstance(open_model(bases["llama"], kernels=False), Model)


@NEEDS_COMPILER
def test_a_compiler_of_several_words_is_refused_where_torch_would_run_it(
    bases: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    open_model(bases["gpt2"], kernels=True)  # the kernels are there before
    monkeypatch.setenv("CXX", "g++ -Wall")
    with pytest.raises(ValueError, match=r"CXX is 'g\+\+ -Wall'.*--compile off"):
        open_model(bases["gpt2"], kernels=True, graphs=True)
    open_model(bases["gpt2"], kernels=True, graphs=False)

"""What a base's own code tells of its masks, its windows, and of who sees which tokens."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tests.makers import EOS_ID, tiny_gpt2, tiny_llama
from tests.server.helpers import GREEDY, NEEDS_COMPILER, Bench, open_model, random_adapter
from tests.server.kinds import Exact, ids_of, save_tiny, score
from tests.zoo import build
from torch import Tensor, nn
from torch.nn.functional import linear
from transformers.masking_utils import (
    bidirectional_mask_function,
    causal_mask_function,
    chunked_causal_mask_function,
    sliding_window_bidirectional_mask_function,
    sliding_window_causal_mask_function,
)

from superpose_adapters.layout import read_layout
from superpose_server.engine.score import ScoreRow
from superpose_server.model.attention import UnknownAttention
from superpose_server.model.batch import Batch
from superpose_server.model.cache import SlotCache
from superpose_server.model.passes import Way, shared_pass
from superpose_server.model.survey import (
    SURVEYED,
    Unshared,
    read_mask,
    survey_attention,
    survey_rows,
)

CPU = torch.device("cpu")
LENGTH = 40


def chunks(size: int) -> Callable[..., Any]:
    mask: Callable[..., Any] = chunked_causal_mask_function(size, torch.zeros(1, dtype=torch.int64))
    return mask


def prefix(size: int) -> Callable[..., Any]:
    """Causal, but that all see the first `size` tokens, as with an image before a text."""

    def sees(row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (key <= query) | (key < size)

    return sees


def blocks(size: int) -> Callable[..., Any]:
    """Causal between blocks, both ways within."""
    return lambda row, head, query, key: key // size <= query // size


def dilated(row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
    return (key <= query) & ((query - key) % 2 == 0)


def with_first(size: int, window: int) -> Callable[..., Any]:
    """A window, and the first `size` tokens."""
    return lambda row, head, query, key: (key <= query) & ((query - key < window) | (key < size))


# Masks.


@given(length=st.integers(2, LENGTH), window=st.integers(1, LENGTH + 5))
def test_a_window_is_read_from_transformers_mask(length: int, window: int) -> None:
    sees = sliding_window_causal_mask_function(window)
    assert read_mask(sees, length) == (window if window < length else None)


@pytest.mark.parametrize("length", [1, 2, 3, 17, LENGTH])
def test_a_window_at_the_edges(length: int) -> None:
    for window in (1, 2, length - 1, length, length + 1, 10 * length):
        if window >= 1:
            found = read_mask(sliding_window_causal_mask_function(window), length)
            assert found == (None if window >= length else window)
    assert read_mask(causal_mask_function, length) is None


REFUSED: dict[str, Callable[..., Any]] = {
    "bidirectional": bidirectional_mask_function,
    "bidirectional with a window": sliding_window_bidirectional_mask_function(4),
    "itself hidden": lambda row, head, query, key: key < query,
    "later ones only": lambda row, head, query, key: key >= query,
    "nothing": lambda row, head, query, key: key < 0,
    "every other": dilated,
}


@pytest.mark.parametrize("name", REFUSED)
def test_other_masks_are_refused(name: str) -> None:
    for length in (LENGTH, LENGTH - 1):
        with pytest.raises(Unshared, match="otherwise than by a window"):
            read_mask(REFUSED[name], length)


@given(length=st.integers(3, 200), size=st.integers(2, 199))
def test_chunks_blocks_and_prefixes_are_refused_wherever_they_end(length: int, size: int) -> None:
    if size < length:
        for mask in (chunks(size), with_first(1, size - 1) if size > 2 else chunks(size)):
            with pytest.raises(Unshared):
                read_mask(mask, length)
    for mask in (prefix(size), blocks(size)):
        with pytest.raises(Unshared):
            read_mask(mask, length)
    if size >= length:  # One chunk is all there is.
        assert read_mask(chunks(size), length) is None


def test_a_long_context_costs_no_square_of_it() -> None:
    before = time.perf_counter()
    for window in (None, 1, 4096, (1 << 20) - 1):
        sees = causal_mask_function
        if window is not None:
            sees = sliding_window_causal_mask_function(window)
        assert read_mask(sees, 1 << 20) == window
    assert time.perf_counter() - before < 10


# Attention.


def windows_of(module: Any, length: int = LENGTH) -> list[int | None]:
    return list(survey_attention(module, length, CPU).values())


def test_each_layer_has_the_window_that_its_own_mask_has() -> None:
    layers = ["sliding_attention", "full_attention"]
    gemma = build("gemma2", layer_types=layers, sliding_window=7, head_dim=8, num_key_value_heads=2)
    assert windows_of(gemma) == [7, None]
    qwen = build("qwen2", use_sliding_window=True, sliding_window=9, max_window_layers=1)
    assert windows_of(qwen) == [None, 9]
    mistral = build("mistral", sliding_window=LENGTH - 1, head_dim=8)
    assert windows_of(mistral) == [LENGTH - 1] * 2
    # As long as a row: nothing is ever cut off.
    assert windows_of(mistral, LENGTH - 1) == [None] * 2
    assert windows_of(tiny_llama()) == [None] * 2
    assert windows_of(tiny_gpt2()) == [None] * 2


def changed(name: str, value: Any) -> Callable[[Any], None]:
    """Hand attention an argument that the model does not."""

    def change(module: Any) -> None:
        for layer in module.model.layers:
            real = layer.self_attn.forward
            layer.self_attn.forward = lambda *a, _real=real, **k: _real(*a, **{**k, name: value})

    return change


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        (changed("position_bias", torch.zeros(1)), UnknownAttention, "position_bias, which is not"),
        (changed("is_causal", False), UnknownAttention, "takes is_causal"),
        (changed("attention_mask", torch.zeros(1, 1, 7, 7)), UnknownAttention, "mask of its own"),
    ],
)
def test_what_attention_does_not_do_here_is_refused(
    change: Callable[[Any], None], error: type[Exception], match: str
) -> None:
    module = tiny_llama()
    change(module)
    with pytest.raises(error, match=match):
        windows_of(module)


def test_arguments_without_effect_are_none() -> None:
    for name, value in [("position_bias", None), ("output_gate", False), ("is_causal", True)]:
        module = tiny_llama()
        changed(name, value)(module)
        assert windows_of(module) == [None] * 2


def test_attention_that_sees_later_tokens_without_a_mask_is_refused() -> None:
    module: Any = tiny_llama()
    for layer in module.model.layers:
        layer.self_attn.is_causal = False
    # A mask of transformers decides, where there is one.
    assert windows_of(module) == [None] * 2
    changed("attention_mask", None)(module)
    with pytest.raises(UnknownAttention, match="sees later tokens"):
        windows_of(module)


def test_keys_that_change_on_their_way_from_the_cache_are_refused() -> None:
    module: Any = tiny_llama()
    real = SlotCache.update

    class Doubling(nn.Module):
        def __init__(self, attention: Any) -> None:
            super().__init__()
            self.attention = attention

        def forward(self, *args: Any, **kwargs: Any) -> Any:
            cache = kwargs["past_key_values"]
            update = cache.update

            class Between:
                def update(self, keys: Tensor, values: Tensor, layer: int) -> Any:
                    keys, values = update(keys, values, layer)
                    return keys * 2, values

            return self.attention(*args, **{**kwargs, "past_key_values": Between()})

    module.model.layers[1].self_attn = Doubling(module.model.layers[1].self_attn)
    with pytest.raises(Unshared, match="changes keys or values between cache and attention"):
        windows_of(module)
    assert SlotCache.update is real


@pytest.mark.parametrize("kind", ["bloom", "gptj", "mpt", "codegen"])
def test_attention_outside_the_interface_is_refused(kind: str) -> None:
    module = build(kind, **({"rotary_dim": 4} if kind in ("gptj", "codegen") else {}))
    with pytest.raises(Unshared, match="outside transformers' interface"):
        windows_of(module)


def test_a_chunked_base_runs_its_rows_alone_and_right(tmp_path: Path) -> None:
    folder = save_tiny(
        tmp_path,
        "llama4_text",
        layer_types=["chunked_attention", "full_attention"],
        attention_chunk_size=8,
        head_dim=8,
        num_key_value_heads=2,
        num_local_experts=2,
        intermediate_size_mlp=48,
        moe_layers=[1],
        no_rope_layers=[1, 0],
    )
    bench = Bench(folder, prefill_tokens=7)
    assert bench.model.way is Way.ROWS
    params = dataclasses.replace(GREEDY, logprobs=True)
    told = []
    for i, length in enumerate((5, 30, 15)):
        _, client = bench.submit(ids_of(i, length), bench.mix(), params)
        told.append((ids_of(i, length), client))
    bench.run()
    exact = Exact(bench)
    for ids, client in told:
        exact.check_text(ids, bench.mix(), client, params.limit)


# Who sees which tokens.


def surveyed(module: nn.Module, *, alone: bool = False) -> tuple[set[str], frozenset[str]]:
    cache = SlotCache(*SURVEYED)
    survey_attention(module, LENGTH, CPU)
    # What runs a pass; attention itself was found to be ours.
    from superpose_server.model import attention

    module.set_attn_implementation(attention.TORCH)  # type: ignore[operator]

    def run(batch: Batch, keep: Tensor) -> Tensor:
        cache.select(batch)
        return shared_pass(module, cache, batch, keep)

    layout, heads = survey_rows(module, read_layout(module), run, CPU, alone=alone)
    return set(layout), heads


def test_the_head_sees_wanted_rows_and_the_rest_all_of_them() -> None:
    for module in (tiny_llama(), tiny_gpt2()):
        names, heads = surveyed(module)
        assert names == set(read_layout(module))
        assert heads == {"lm_head"}


def test_modules_that_are_never_called_are_no_targets() -> None:
    module: Any = tiny_llama()
    module.model.layers[0].spare = nn.Linear(32, 32)
    names, _ = surveyed(module)
    assert "model.layers.0.spare" not in names
    assert "model.layers.0.mlp.up_proj" in names


class Router(nn.Linear):
    """What some families have: a product, and more than that."""

    def forward(self, input: Tensor) -> Any:
        scores = super().forward(input)
        return scores.softmax(-1), scores


class Scaled(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return 2.0 * super().forward(input)


class Apart(nn.Linear):
    """Falcon's: the same product, spelt otherwise."""

    def forward(self, input: Tensor) -> Tensor:
        return input @ self.weight.T + self.bias


class Mlp(nn.Module):
    """A Llama's, with something beside it."""

    def __init__(self, mlp: nn.Module, beside: Callable[[nn.Module, Tensor], None]) -> None:
        super().__init__()
        self.mlp = mlp
        self.beside = nn.ModuleList()
        self._call = beside

    def forward(self, x: Tensor) -> Any:
        for module in self.beside:
            self._call(module, x)
        return self.mlp(x)


def with_beside(call: Callable[[nn.Module, Tensor], Any], *modules: nn.Module) -> Any:
    model: Any = tiny_llama()
    model.model.layers[1].mlp = mlp = Mlp(model.model.layers[1].mlp, call)
    mlp.beside.extend(modules)
    return model


def test_a_subclass_is_a_target_if_it_is_a_product_and_no_more() -> None:
    modules = (Router(32, 4), Scaled(32, 4), Apart(32, 4), nn.Linear(32, 4))
    names, _ = surveyed(with_beside(lambda module, x: module(x), *modules))
    prefix = "model.layers.1.mlp.beside."
    assert {name for name in names if name.startswith(prefix)} == {prefix + "2", prefix + "3"}


@pytest.mark.parametrize(
    "call",
    [
        lambda module, x: module(x[:, :3]),  # an expert, with some of the tokens
        lambda module, x: [module(x), module(x[:, 1:])],
        lambda module, x: module(x.mean(1)),
        lambda module, x: module(torch.cat((x, x), 1)),
        lambda module, x: linear(x, module.weight),  # read, and never called
        lambda module, x: module(input=x),
    ],
    ids=["some", "all and some", "pooled", "twice as many", "read", "by name"],
)
def test_modules_that_see_other_tokens_are_no_targets(call: Callable[..., Any]) -> None:
    names, heads = surveyed(with_beside(call, nn.Linear(32, 4)))
    assert not any("beside" in name for name in names)
    assert heads == {"lm_head"}


def test_where_a_row_has_a_pass_to_itself_modules_may_see_what_they_like_of_it() -> None:
    calls: list[Callable[..., Any]] = [lambda m, x: m(x[:, :3]), lambda m, x: m(x.mean(1))]
    for call in calls:
        names, heads = surveyed(with_beside(call, nn.Linear(32, 4), Router(32, 4)), alone=True)
        assert {name for name in names if "beside" in name} == {"model.layers.1.mlp.beside.0"}
        assert heads == frozenset()


def test_a_module_that_is_called_twice_with_every_token_is_a_target() -> None:
    names, _ = surveyed(with_beside(lambda m, x: [m(x), m(x + 1)], nn.Linear(32, 4)))
    assert "model.layers.1.mlp.beside.0" in names


@pytest.mark.parametrize("kernels", [False, pytest.param(True, marks=NEEDS_COMPILER)])
def test_a_head_before_the_head_is_corrected_where_it_is_wanted(
    tmp_path: Path, kernels: bool
) -> None:
    folder = save_tiny(
        tmp_path,
        "modernbert-decoder",
        global_attn_every_n_layers=2,
        local_attention=12,
        **dict.fromkeys(("pad_token_id", "cls_token_id", "sep_token_id"), EOS_ID),
    )
    bench = Bench(folder, kernels=kernels, prefill_tokens=9)
    assert bench.model.way is Way.SHARED
    heads = set(bench.model.heads)
    assert "lm_head.dense" in heads
    names = ("lm_head.dense", "model.layers.1.mlp.Wo")
    one = random_adapter(bench.layout, 1, modules=names, size=0.3)
    two = random_adapter(bench.layout, 2, modules=("lm_head.dense",), size=0.3)
    mixes = [bench.mix((one, 1.0)), bench.mix(), bench.mix((one, -0.5), (two, 1.0))]
    params = dataclasses.replace(GREEDY, logprobs=True)
    told = []
    for i, (mix, length) in enumerate(zip(mixes, (20, 4, 11), strict=True)):
        _, client = bench.submit(ids_of(i, length), mix, params)
        told.append((ids_of(i, length), mix, client))
    bench.engine.step()
    bench.fold(mixes[2])
    bench.run()
    exact = Exact(bench)
    for ids, mix, client in told:
        exact.check_text(ids, mix, client, params.limit)
    rows = [ScoreRow(tuple(ids_of(4, 30)), first=11), ScoreRow(tuple(ids_of(5, 6)))]
    exact.check_scores(score(bench, rows, mixes[0]), rows, mixes[0])


@pytest.mark.parametrize("kernels", [False, pytest.param(True, marks=NEEDS_COMPILER)])
@pytest.mark.parametrize("kind", ["mixtral", "phimoe", "llama4_text"])
def test_experts_and_routers_are_left_alone_and_the_rest_is_adapted(
    tmp_path: Path, kind: str, kernels: bool
) -> None:
    fields: dict[str, Any] = {"num_local_experts": 4, "num_key_value_heads": 2}
    if kind == "llama4_text":
        fields |= {"head_dim": 8, "intermediate_size_mlp": 48, "attention_chunk_size": 999}
    bench = Bench(save_tiny(tmp_path, kind, **fields), kernels=kernels, prefill_tokens=8)
    names = set(bench.layout)
    assert {f"model.layers.1.self_attn.{p}_proj" for p in "qkvo"} <= names
    assert not any("expert" in name and "shared_expert" not in name for name in names)
    routers = {n for n, m in bench.pristine.named_modules() if n.endswith(("router", "gate"))}
    assert routers
    assert not names & routers
    one = random_adapter(bench.layout, 1, size=0.1)
    params = dataclasses.replace(GREEDY, logprobs=True)
    mixes = [bench.mix((one, 1.0)), bench.mix()]
    clients = [bench.submit(ids_of(i, 10 + i), mix, params)[1] for i, mix in enumerate(mixes)]
    bench.run()
    exact = Exact(bench)
    for i, (client, mix) in enumerate(zip(clients, mixes, strict=True)):
        exact.check_text(ids_of(i, 10 + i), mix, client, params.limit)


def test_the_survey_leaves_no_hook_behind(bases: dict[str, Path]) -> None:
    model = open_model(bases["llama"])
    assert not any(part._forward_hooks for part in model.module.modules())

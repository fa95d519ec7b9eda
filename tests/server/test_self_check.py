"""The self-checks of a base: what is broken here is refused, what is right is not."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import pytest
import torch
from tests.makers import tiny_gpt2, tiny_llama
from tests.server.helpers import open_weights
from tests.zoo import build
from torch import Tensor, nn
from transformers import AttentionInterface

import superpose_server.engine.twin_check as twin_check
import superpose_server.engine.weights_check as weights_check
import superpose_server.model.attention as attention
import superpose_server.model.model as model_room
import superpose_server.model.packed as packed
import superpose_server.model.passes as passes
from superpose_adapters.layout import read_layout as read_layout_of
from superpose_adapters.mix import BoundMix
from superpose_server.engine.probe import random_ids
from superpose_server.engine.runner import Runner
from superpose_server.engine.twin_check import check_meaning
from superpose_server.engine.weights_check import Expected, check_weights, expect
from superpose_server.errors import SelfCheckError
from superpose_server.model.batch import Batch, Span
from superpose_server.model.cache import SlotCache, TokenStore
from superpose_server.model.miniature import MiniatureError
from superpose_server.model.model import Model
from superpose_server.model.rope import fix_frequencies
from superpose_server.weights.corrections import Corrections

CPU = torch.device("cpu")
Patch = pytest.MonkeyPatch

# Each a base whose passes need something that others do not.
BASES = (
    "gpt2",  # learned positions, a tied head
    "llama",
    "gemma2",  # windows, caps on attention and logits, a scaling of its own
    "gpt_oss",  # sinks, which are direct parameters, windows, experts
    "granite",  # a residual multiplier
    "mixtral",
    "llama/longrope",
    "bloom",  # attention of its own, so that its rows run alone
    "xlm/causal",  # no cache: whole rows
)


@cache
def original(name: str) -> Any:
    makers: dict[str, Callable[[], Any]] = {"gpt2": tiny_gpt2, "llama": tiny_llama}
    return makers[name]() if name in makers else build(name)


def copy_of(name: str, dtype: torch.dtype = torch.float32) -> Any:
    made = original(name)
    module = type(made)._from_config(copy.deepcopy(made.config), attn_implementation="eager")
    module.load_state_dict(made.state_dict())
    module.eval().requires_grad_(False)
    for parameter in module.parameters():  # As transformers loads it, frequencies stay as they are.
        parameter.data = parameter.data.to(dtype)
    return module


def meaning(name: str, *, kernels: bool) -> None:
    made = original(name)
    check_meaning(type(made), copy.deepcopy(made.config), CPU, kernels=kernels)


def weights(module: Any, *, kernels: bool, length: int | None = None) -> None:
    expected = expect(module, length)
    check_weights(open_runner(module, kernels=kernels, length=length), expected)


def open_runner(module: Any, *, kernels: bool = False, length: int | None = 48) -> Runner:
    model = Model(
        module,
        base_digest="base",
        device=CPU,
        max_batch=2,
        max_length=length,
        kernels=kernels,
        graphs=False,
    )
    return Runner(model, open_weights(model))


# What is right.


@pytest.mark.parametrize("name", BASES)
def test_a_sound_base_passes(name: str, kernels: bool) -> None:
    meaning(name, kernels=kernels)
    for dtype in (torch.float32, torch.bfloat16):
        weights(copy_of(name, dtype), kernels=kernels)
    if not kernels:
        weights(copy_of(name, torch.float16), kernels=False)


# What is broken.


def attend(patch: Patch, change: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    """Change what both kinds of attention are given, by name."""
    for name in (attention.TORCH, attention.KERNEL):
        real = AttentionInterface._global_mapping[name]

        def changed(
            module: nn.Module,
            query: Tensor,
            keys: Tensor,
            values: Tensor,
            mask: None,
            *,
            real: Any = real,
            **others: Any,
        ) -> Any:
            given = change({"query": query, "keys": keys, "values": values, **others})
            query, keys, values = (given.pop(k) for k in ("query", "keys", "values"))
            return real(module, query, keys, values, mask, **given)

        patch.setitem(AttentionInterface._global_mapping, name, changed)


def without(name: str) -> Callable[[Patch], None]:
    return lambda patch: attend(patch, lambda given: given | {name: None})


def windows(change: Callable[[int], int | None]) -> Callable[[Patch], None]:
    def spoil(patch: Patch) -> None:
        real = attention.window_of

        def changed(module: nn.Module) -> int | None:
            window = real(module)
            return None if window is None else change(window)

        patch.setattr(attention, "window_of", changed)

    return spoil


def batches(change: Callable[[Batch], dict[str, Any]]) -> Callable[[Patch], None]:
    def spoil(patch: Patch) -> None:
        real = Batch.of.__func__  # type: ignore[attr-defined]

        def changed(cls: type[Batch], *arguments: Any) -> Batch:
            batch: Batch = real(cls, *arguments)
            return dataclasses.replace(batch, **change(batch))

        patch.setattr(Batch, "of", classmethod(changed))

    return spoil


def later_tokens_seen(patch: Patch) -> None:
    def change(given: dict[str, Any]) -> dict[str, Any]:
        batch: Batch = given["batch"]
        last = torch.tensor([batch.spans[row].end - 1 for row in batch.rows.tolist()])
        seen = torch.minimum(batch.written + 1, last)
        return given | {"batch": dataclasses.replace(batch, written=seen)}

    attend(patch, change)


def other_slots_read(patch: Patch) -> None:
    def change(given: dict[str, Any]) -> dict[str, Any]:
        return given | {name: given[name].roll(1, 0).contiguous() for name in ("keys", "values")}

    attend(patch, change)


def written(change: Callable[[SlotCache, Tensor, int], Tensor]) -> Callable[[Patch], None]:
    """Change where the keys and values of a layer go: positions in the slot; -1 is nowhere."""

    def spoil(patch: Patch) -> None:
        def update(
            self: Any, keys: Tensor, values: Tensor, layer: int, *_: Any, **__: Any
        ) -> tuple[Tensor, Tensor]:
            batch = self._batch
            if layer == len(self._keys):
                for stores, new in ((self._keys, keys), (self._values, values)):
                    shape = (self.slots, new.shape[1], self.max_length, new.shape[3])
                    stores.append(torch.zeros(shape, dtype=new.dtype))
            stored = self._keys[layer], self._values[layer]
            places = change(self, batch.written, layer)
            for store, new in zip(stored, (keys, values), strict=True):
                kept = places >= 0
                store[batch.slots[kept], :, places[kept]] = new[0].transpose(0, 1)[kept]
            return stored

        patch.setattr(SlotCache, "update", update)

    return spoil


def _nowhere(cache: SlotCache, places: Tensor, layer: int) -> Tensor:
    return torch.full_like(places, -1) if layer == 1 else places


def _nowhere_when_decoding(cache: SlotCache, places: Tensor, layer: int) -> Tensor:
    batch = cache._batch
    assert batch is not None
    return _nowhere(cache, places, layer) if batch.decodes else places


def _one_later(cache: SlotCache, places: Tensor, layer: int) -> Tensor:
    return (places + 1).clamp(max=cache.max_length - 1)


def rope_of_the_batch(patch: Patch) -> None:
    patch.setattr(model_room, "fix_frequencies", lambda module: None)


def no_switch(patch: Patch) -> None:
    real = fix_frequencies

    def fix(module: nn.Module) -> None:
        real(module)

    patch.setattr(model_room, "fix_frequencies", fix)


def correct(change: Callable[[Batch], Batch | None]) -> Callable[[Patch], None]:
    def spoil(patch: Patch) -> None:
        real = Corrections.applied

        @contextmanager
        def applied(
            self: Corrections, correction: Any, batch: Batch, keep: Tensor
        ) -> Iterator[None]:
            changed = change(batch)
            applies = correction if changed is not None else None
            with real(self, applies, changed or batch, keep):
                yield

        patch.setattr(Corrections, "applied", applied)

    return spoil


def _of_the_other_row(batch: Batch) -> Batch:
    return dataclasses.replace(batch, rows=batch.rows.max() - batch.rows)


def wrong_panel(patch: Patch) -> None:
    real = packed.pack

    def pack(parameter: Tensor, *, transposed: bool) -> Tensor:
        panels = real(parameter, transposed=transposed)
        panels[0] = panels[0].roll(1, 1)
        return panels

    patch.setattr(packed, "pack", pack)


def residuals_not_scaled(patch: Patch) -> None:
    real = read_layout_of

    def read_layout(module: nn.Module) -> Any:
        for part in module.modules():
            if hasattr(part, "residual_multiplier"):
                part.residual_multiplier = 1.0  # type: ignore[assignment]
        return real(module)

    patch.setattr(model_room, "read_layout", read_layout)


def logits_of_the_next_token(patch: Patch) -> None:
    for way, real in model_room._RUN.items():

        def shifted(
            module: Any, cache: Any, batch: Batch, keep: Tensor, real: Any = real
        ) -> Tensor:
            return real(module, cache, batch, (keep - 1).clamp(min=0))  # type: ignore[no-any-return]

        patch.setitem(model_room._RUN, way, shifted)


def row_sees_only_the_pass(patch: Patch) -> None:
    real = passes.row_pass

    def alone(module: Any, cache: SlotCache, batch: Batch, keep: Tensor) -> Tensor:
        [span] = batch.spans
        begins = dataclasses.replace(span, start=span.position)
        return real(module, cache, dataclasses.replace(batch, spans=(begins,)), keep)

    patch.setitem(model_room._RUN, passes.Way.ROWS, alone)


def row_of_its_last_tokens(patch: Patch) -> None:
    real = TokenStore.whole

    def cut(self: Any, span: Span) -> Span:
        whole = real(self, span)
        return dataclasses.replace(whole, ids=[whole.ids[-1]] * len(whole.ids))

    patch.setattr(TokenStore, "whole", cut)


@dataclasses.dataclass(frozen=True)
class Fault:
    """Something broken in our own code, the base that shows it, and which checks must see it."""

    base: str
    spoil: Callable[[Patch], None]
    by_twin: bool = True
    by_weights: bool = True
    kernels: tuple[bool, ...] = (False, True)


def _fault(name: str, base: str, spoil: Callable[[Patch], None], **more: Any) -> dict[str, Fault]:
    return {f"{name}, {base}": Fault(base, spoil, **more)}


FAULTS: dict[str, Fault] = {
    **_fault("window dropped", "gemma2", windows(lambda window: None)),
    **_fault("window dropped", "gpt_oss", windows(lambda window: None)),
    **_fault("window one too long", "gemma2", windows(lambda window: window + 1)),
    **_fault("window one too short", "gpt_oss", windows(lambda window: window - 1)),
    **_fault("cap dropped", "gemma2", without("softcap")),
    **_fault("sinks dropped", "gpt_oss", without("s_aux")),
    **_fault("scaling dropped", "gemma2", without("scaling")),
    **_fault("scaling dropped", "granite", without("scaling")),
    **_fault(
        "positions one later",
        "gpt2",
        batches(lambda batch: {"positions": (batch.positions + 1).clamp(max=23)}),
    ),
    **_fault(
        "positions ignored",
        "gpt2",
        batches(lambda batch: {"positions": torch.zeros_like(batch.positions)}),
    ),
    **_fault(
        "positions ignored",
        "llama",
        batches(lambda batch: {"positions": torch.zeros_like(batch.positions)}),
    ),
    **_fault("written one later", "gpt2", written(_one_later)),
    **_fault("written one later", "llama", written(_one_later)),
    **_fault("layer not written", "gpt2", written(_nowhere)),
    **_fault("layer not written", "mixtral", written(_nowhere)),
    **_fault("layer not written when decoding", "llama", written(_nowhere_when_decoding)),
    **_fault("layer not written when decoding", "mixtral", written(_nowhere_when_decoding)),
    **_fault("rotations of the batch", "llama/longrope", rope_of_the_batch, by_weights=False),
    **_fault("rotations not switched", "llama/longrope", no_switch),
    **_fault("later tokens seen", "gpt2", later_tokens_seen),
    **_fault("later tokens seen", "gemma2", later_tokens_seen),
    **_fault("other slots read", "llama", other_slots_read),
    **_fault("other slots read", "gpt_oss", other_slots_read),
    **_fault("correction of the other row", "llama", correct(_of_the_other_row), by_weights=False),
    **_fault("no correction", "gpt2", correct(lambda batch: None), by_weights=False),
    **_fault("no correction", "bloom", correct(lambda batch: None), by_weights=False),
    **_fault("no correction", "xlm/causal", correct(lambda batch: None), by_weights=False),
    **_fault("one panel wrong", "gpt2", wrong_panel, kernels=(True,)),
    **_fault("one panel wrong", "mixtral", wrong_panel, kernels=(True,)),
    **_fault("residuals not scaled", "granite", residuals_not_scaled),
    **_fault("logits of another token", "llama", logits_of_the_next_token),
    **_fault("row sees only the pass", "bloom", row_sees_only_the_pass),
    **_fault("row of one token", "xlm/causal", row_of_its_last_tokens),
}


@pytest.mark.parametrize("case", FAULTS)
def test_a_broken_base_is_refused(case: str, kernels: bool, monkeypatch: Patch) -> None:
    fault = FAULTS[case]
    if kernels not in fault.kernels:
        pytest.skip("shows with the kernels only")
    # In bfloat16, where rounding hides most.
    modules = [copy_of(fault.base, torch.bfloat16)] if fault.by_weights else []
    fault.spoil(monkeypatch)
    if fault.by_twin:
        # Rotations that depend on a text's length look like sight of its later tokens.
        words = "see later ones" if "longrope" in fault.base else "of a small random model of its"
        with pytest.raises(SelfCheckError, match=words):
            meaning(fault.base, kernels=kernels)
    for module in modules:
        with pytest.raises(SelfCheckError, match=r"^its weights give another (prompt|answer) here"):
            weights(module, kernels=kernels)


def test_every_part_that_a_fault_is_about_is_named(monkeypatch: Patch) -> None:
    written(_nowhere_when_decoding)(monkeypatch)
    with pytest.raises(SelfCheckError) as caught:
        weights(copy_of("llama", torch.bfloat16), kernels=False)
    assert str(caught.value).startswith("its weights give another answer here than in transformers")
    with pytest.raises(SelfCheckError, match="has another answer here"):
        meaning("llama", kernels=False)
    without("softcap")(monkeypatch)
    with pytest.raises(SelfCheckError, match=r"\(gemma2, .*attn_logit_softcapping=2\.0.*window=8"):
        meaning("gemma2", kernels=False)


# Meaning.


def test_a_base_without_a_twin_is_refused(monkeypatch: Patch) -> None:
    def make(*_: Any) -> None:
        raise MiniatureError("no small twin of X can be made")

    monkeypatch.setattr(twin_check, "make_miniature", make)
    with pytest.raises(SelfCheckError, match=r"^it cannot be checked: no small twin of X"):
        meaning("gpt2", kernels=False)


def test_a_base_that_cannot_be_run_is_refused_and_a_lack_of_memory_is_not_its_fault(
    monkeypatch: Patch,
) -> None:
    raised: list[Exception] = [KeyError("a\n b")]

    def fail(*_: Any) -> None:
        raise raised[-1]

    monkeypatch.setattr(twin_check, "_serve", fail)
    with pytest.raises(SelfCheckError, match=r"^it cannot be run: KeyError: 'a\\n b' \(gpt2"):
        meaning("gpt2", kernels=False)
    for error in (
        MemoryError("x"),
        torch.OutOfMemoryError("x"),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"),
    ):
        raised.append(error)
        with pytest.raises(type(error)) as caught:
            meaning("gpt2", kernels=False)
        assert caught.value is error


def test_a_model_whose_tokens_see_later_ones_is_refused(monkeypatch: Patch) -> None:
    made = original("llama")
    real = type(made).forward

    def forward(self: Any, *arguments: Any, **more: Any) -> Any:
        output = real(self, *arguments, **more)
        if output.logits.shape[1] > 1 and "batch" not in more:
            output.logits = output.logits + output.logits.mean(1, keepdim=True)
        return output

    monkeypatch.setattr(type(made), "forward", forward)
    with pytest.raises(SelfCheckError, match="see later ones"):
        meaning("llama", kernels=False)


# Weights.


def state(module: nn.Module) -> dict[str, tuple[int, torch.dtype, Tensor]]:
    tensors = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    return {n: (t.data_ptr(), t.dtype, t.detach().clone()) for n, t in tensors.items()}


def hooks(module: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in module.modules())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", [*BASES, "dbrx", "gemma3n_text", "deepseek_v3", "ctrl"])
def test_what_is_asked_leaves_the_base_as_it_was(name: str, dtype: torch.dtype) -> None:
    module = copy_of(name, dtype)
    before, hooked = state(module), hooks(module)
    parameters = list(module.parameters())
    expected = expect(module)
    assert (expected.own_error == 0) == (dtype == torch.float32)
    after = state(module)
    assert before.keys() == after.keys()
    for tensor, (address, kind, value) in before.items():
        assert after[tensor][:2] == (address, kind), tensor
        assert torch.equal(after[tensor][2], value), tensor
    assert all(a is b for a, b in zip(parameters, module.parameters(), strict=True))
    assert hooks(module) == hooked


@pytest.mark.parametrize("name", ["gpt2", "llama", "gpt_oss", "dbrx"])
def test_what_is_asked_is_what_the_stored_weights_give_in_float32(name: str) -> None:
    module = copy_of(name, torch.bfloat16)
    wide = copy_of(name)
    wide.load_state_dict(module.state_dict())
    expected = expect(module, 18)
    assert {len(text) for text in expected.texts} == {18}
    exact = wide(input_ids=torch.tensor(expected.texts)).logits
    torch.testing.assert_close(expected.logits, exact, rtol=0, atol=1e-4)


def test_parameters_are_widened_a_layer_at_a_time() -> None:
    module = tiny_llama(num_hidden_layers=6).to(torch.bfloat16)
    most = [0]

    def look(part: nn.Module, *_: object) -> None:
        wide = {p for p in module.parameters() if p.dtype == torch.float32}
        most.append(sum(p.numel() for p in wide))

    for part in module.modules():
        part.register_forward_pre_hook(look)
        part.register_forward_hook(look)
    expect(module)
    layer: Any = module.model.layers[0]
    units = [sum(p.numel() for p in layer.parameters()), module.lm_head.weight.numel()]
    # Hooks that come before ours see what is wide already, those after it still do.
    assert 0 < max(most) <= max(units)


def test_two_layers_may_read_one_anothers_parameters(caplog: pytest.LogCaptureFixture) -> None:
    """What cannot be computed in float32 is assumed, with a line that says so."""
    module: Any = tiny_llama().to(torch.bfloat16).requires_grad_(False)
    first, second = module.model.layers
    # Read while the first layer runs, when only its own parameters are wide.
    first.register_forward_hook(
        lambda _, __, out: out + torch.nn.functional.linear(out, second.self_attn.q_proj.weight)
    )
    caplog.set_level("WARNING")
    before = state(module)
    expected = expect(module)
    assert "cannot be measured and is assumed (RuntimeError: " in caplog.text
    assert expected.own_error == 4 * torch.finfo(torch.bfloat16).eps
    assert {n: t[:2] for n, t in state(module).items()} == {n: t[:2] for n, t in before.items()}
    check_weights(open_runner(module), expected)


def test_an_assumed_error_still_refuses_a_layer_that_is_not_written(monkeypatch: Patch) -> None:
    def fail(module: nn.Module) -> None:
        raise TypeError("no")

    monkeypatch.setattr(weights_check, "widened", fail)
    weights(copy_of("llama", torch.bfloat16), kernels=False)
    module = copy_of("llama", torch.bfloat16)
    written(_nowhere_when_decoding)(monkeypatch)
    with pytest.raises(SelfCheckError, match="another answer"):
        weights(module, kernels=False)


def test_output_that_is_not_finite_has_a_line_of_its_own() -> None:
    module = copy_of("llama", torch.float16)
    module.model.layers[1].mlp.down_proj.weight.fill_(6e4)
    with pytest.raises(SelfCheckError, match=r"^its output is not finite in float16, in tran.*cop"):
        expect(module)
    assert not any(p.dtype == torch.float32 for p in module.parameters())
    broken = copy_of("gpt2")
    broken.transformer.ln_f.weight[3] = torch.nan
    with pytest.raises(SelfCheckError, match=r"not finite in float32"):
        expect(broken)


def test_what_is_not_finite_here_alone_is_refused(monkeypatch: Patch) -> None:
    module = copy_of("llama")
    expected = expect(module)
    runner = open_runner(module)
    with torch.inference_mode():
        module.model.norm.weight[0] = torch.nan
    with pytest.raises(SelfCheckError, match="off by nan %"):
        check_weights(runner, expected)


def test_a_pass_that_fails_in_transformers_too_is_told(monkeypatch: Patch) -> None:
    module = copy_of("llama")

    def fail(*_: Any, **__: Any) -> None:
        raise raised

    monkeypatch.setattr(type(module), "forward", fail)
    raised: Exception = TypeError("it\nbreaks")
    with pytest.raises(SelfCheckError, match=r"in transformers' own pass either: TypeError: it br"):
        expect(module)
    raised = MemoryError()
    with pytest.raises(MemoryError):
        expect(module)


def test_a_dtype_that_changes_what_a_base_says_is_told(
    monkeypatch: Patch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("WARNING")
    assert expect(copy_of("llama", torch.bfloat16)).own_error < 0.02
    assert caplog.text == ""
    monkeypatch.setattr(weights_check, "_NOTABLE", 1e-3)
    expect(copy_of("llama", torch.bfloat16))
    assert "in bfloat16 the base's logits are off by " in caplog.text


@pytest.mark.parametrize(("positions", "length"), [(64, 2), (64, 14), (5, None), (5, 9)])
def test_short_rows_are_checked_as_far_as_they_go(positions: int, length: int | None) -> None:
    module = tiny_gpt2(n_positions=positions)
    expected = expect(module, length)
    assert {len(text) for text in expected.texts} == {min(positions, length or positions, 20)}
    usable = None if length is None else min(positions, length)
    check_weights(open_runner(module, length=usable), expected)


def test_logits_without_any_spread_are_no_fault() -> None:
    module = copy_of("llama", torch.bfloat16)
    module.lm_head.weight.zero_()
    weights(module, kernels=False)


def offs(monkeypatch: Patch, *found: tuple[float, float]) -> list[int]:
    """Let texts be as far off as said, prompts and answers; return what is counted."""
    calls: list[int] = []

    def near(*_: Any) -> dict[str, float]:
        calls.append(0)
        return dict(zip(("prompt", "answer"), found[len(calls) - 1], strict=True))

    monkeypatch.setattr(weights_check, "_try", near)
    return calls


def test_a_base_is_refused_for_what_is_in_every_text(monkeypatch: Patch) -> None:
    """A router that rounding turns is far off in one text; a fault is in all of them."""
    runner = open_runner(copy_of("llama"))
    texts = tuple(random_ids(4, range(200), seed) for seed in range(3))
    expected = Expected(texts, torch.zeros(3, 4, 257), own_error=0.01)
    nan = float("nan")
    for found, tried in (
        ([(0.04, 0.04)], 1),
        ([(0.5, 0.04), (0.01, 0.01)], 2),
        ([(0.04, 0.5), (nan, nan), (0.01, 0.01)], 3),
    ):
        with monkeypatch.context() as patch:
            calls = offs(patch, *found)
            check_weights(runner, expected)
            assert len(calls) == tried
    for found, line in (
        ([(0.01, 0.5), (0.3, 0.01), (0.01, 0.6)], "another prompt .* off by 30 %"),
        ([(nan, 0.01), (0.01, nan), (0.01, 0.6)], "another answer .* off by 60 %.*explains 4.1 %"),
        ([(nan, 0.01)] * 3, "another prompt .* off by nan %"),
    ):
        with monkeypatch.context() as patch:
            offs(patch, *found)
            with pytest.raises(SelfCheckError, match=line):
                check_weights(runner, expected)


@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe", "gpt_oss", "olmoe"])
def test_experts_in_bfloat16_are_no_fault(name: str, kernels: bool) -> None:
    """Of eight layers, each with eight experts that about tie, so that rounding turns some."""
    config = original(name).config.to_dict()
    layers = {
        "num_hidden_layers": 8,
        "layer_types": None,
        "num_local_experts": 8,
        "num_experts": 8,
        "initializer_range": 0.1,
    }
    changed = type(original(name).config)(
        **(config | {k: v for k, v in layers.items() if k in config})
    )
    torch.manual_seed(0)
    module = type(original(name))._from_config(changed, attn_implementation="eager")
    weights(module.eval().requires_grad_(False).to(torch.bfloat16), kernels=kernels)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("make", [tiny_gpt2, tiny_llama])
def test_a_deep_base_is_no_fault(
    make: Callable[..., Any], dtype: torch.dtype, kernels: bool
) -> None:
    name = "n_layer" if make is tiny_gpt2 else "num_hidden_layers"
    module = make(**{name: 12}).requires_grad_(False).to(dtype)
    weights(module, kernels=kernels)


def test_the_check_leaves_no_trace() -> None:
    module = copy_of("llama", torch.bfloat16)
    expected = expect(module)
    runner = open_runner(module)
    ids = random_ids(12, range(200), 9)
    base = BoundMix("base")
    fresh = runner.run([Span(0, ids, 0)], range(12), [base]).clone()
    before = state(module)
    check_weights(runner, expected)
    assert torch.equal(runner.run([Span(0, ids, 0)], range(12), [base]), fresh)
    assert all(torch.equal(state(module)[n][2], t[2]) for n, t in before.items())
    assert hooks(module) == 0

"""What methods learn from rows, against plain transformers and PEFT models run row by row."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.makers import (
    load_peft,
    make_adapter,
    save_base,
    tiny_gpt2,
    tiny_llama,
    tiny_tokenizer,
)
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from superpose_adapters.bundled import MINI
from superpose_adapters.layout import read_layout
from superpose_adapters.merge.lorahub import LoraHub
from superpose_adapters.merge.merge import Part, in_order, merge
from superpose_adapters.merge.method import Method
from superpose_adapters.merge.methods import DATA_METHODS, MethodError, read_method
from superpose_adapters.merge.plain_sum import PlainSum
from superpose_adapters.merge.regmean import RegMean
from superpose_adapters.merge.soups import Soups
from superpose_adapters.peft.folder import read_adapter
from superpose_adapters.qa import Row, read_rows, row_text
from superpose_train.merging.data_method import Reading, data_method

ROWS = {
    "law": [Row("what?", "that."), Row("who was it?", "she"), Row("so?", "no, it is not so")],
    "art": [Row("a b c", "d"), Row("red or blue?", "red")],
}
Pairs = Mapping[str, tuple[Tensor, Tensor]]


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory: pytest.TempPathFactory) -> tuple[nn.Module, Path, list[Part]]:
    """A base with two adapters, on modules that they share in part, one with rsLoRA."""
    model, folder = tiny_gpt2(), tmp_path_factory.mktemp("gpt2")
    base = save_base(model, folder / "base")
    law = make_adapter(model, folder / "law", seed=1, size=0.3, target_modules=["c_attn", "c_fc"])
    art = make_adapter(
        model, folder / "art", seed=2, size=0.3, target_modules=["c_attn"], use_rslora=True, r=4
    )
    return model, base, parts_of(model, {"law": law, "art": art}, {"law": 1.0, "art": -0.5})


def parts_of(
    model: nn.Module, folders: Mapping[str, Path], weights: Mapping[str, float]
) -> list[Part]:
    layout = read_layout(model)
    return [
        Part(name, read_adapter(folder, layout), weights[name]) for name, folder in folders.items()
    ]


def folded(model: Any, pairs: Pairs) -> Any:
    """The model with deltas added to its parameters."""
    state = model.state_dict()
    for module, (a, b) in pairs.items():
        transposed = type(model.get_submodule(module)).__name__ == "Conv1D"
        delta = (b @ a).T if transposed else b @ a
        state[f"{module}.weight"] = state[f"{module}.weight"] + delta
    other = type(model)(model.config).eval()
    other.load_state_dict(state)
    return other


@torch.no_grad()
def loss(model: Any, tokenizer: Any, rows: Mapping[str, Sequence[Row]]) -> float:
    """Nats a token, by transformers' own loss, row by row."""
    nats, tokens = 0.0, 0
    for row in (row for each in rows.values() for row in each):
        text = row_text(row.question, row.answer) + tokenizer.eos_token
        ids = torch.tensor([tokenizer(text)["input_ids"]])
        count = ids.shape[1] - 1
        nats += count * float(model(input_ids=ids, labels=ids, use_cache=False).loss)
        tokens += count
    return nats / tokens


def inputs_of(model: nn.Module, name: str, rows: Sequence[Row]) -> Tensor:
    """What a module is given for each token of rows, float64 (tokens, in)."""
    seen: list[Tensor] = []
    module = model.get_submodule(name)
    handle = module.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0][0]))
    tokenizer = tiny_tokenizer()
    with torch.no_grad():
        for row in rows:
            text = row_text(row.question, row.answer) + tokenizer.eos_token
            model(input_ids=torch.tensor([tokenizer(text)["input_ids"]]))
    handle.remove()
    return torch.cat(seen).double()


def learn(name: str, base: Path, parts: Sequence[Part], **options: object) -> Method:
    return data_method(name, options, str(base), parts, ROWS)


def test_moments_are_those_of_each_part_alone_on_its_own_rows(
    gpt2: tuple[nn.Module, Path, list[Part]],
) -> None:
    model, base, parts = gpt2
    method = learn("regmean", base, parts)
    assert isinstance(method, RegMean)
    assert method.moments is not None
    assert set(method.moments) == {m for part in parts for m in part.adapter.modules}
    for i, part in enumerate(in_order(parts)):
        alone = folded(model, merge([part], PlainSum()))
        for name, moments in method.moments.items():
            x = inputs_of(alone, name, ROWS[part.domain])
            torch.testing.assert_close(moments[i].double(), x.T @ x / len(x), rtol=1e-4, atol=1e-5)


def test_regmean_of_a_llama_is_near_each_adapter_on_its_own_inputs(tmp_path: Path) -> None:
    model = tiny_llama()
    base = save_base(model, tmp_path / "base")
    pattern = {"v_proj": 2}
    folders = {
        "law": make_adapter(model, tmp_path / "law", 1, size=0.3, rank_pattern=pattern),
        "art": make_adapter(model, tmp_path / "art", 2, size=0.3, r=3),
    }
    parts = parts_of(model, folders, {"law": 1.0, "art": 1.0})
    merged = merge(parts, learn("regmean", base, parts, off_diagonal=0.9))
    added = merge(parts, PlainSum())
    module = "model.layers.1.mlp.down_proj"
    seen = []
    for name, folder in folders.items():
        adapted = load_peft(model, folder)
        adapter: Any = adapted.get_submodule(f"base_model.model.{module}")
        delta = adapter.get_delta_weight("default").detach().double()
        x = inputs_of(adapted.get_submodule("base_model.model"), module, ROWS[name])
        seen.append((x, x @ delta.T))

    def off(factor: float, pairs: Pairs) -> float:
        a, b = (each.double() for each in pairs[module])
        return sum(float((factor * x @ a.T @ b.T - own).square().sum()) for x, own in seen)

    assert off(1.0, merged) < 0.95 * min(off(factor, added) for factor in (0.25, 0.5, 0.75, 1.0))


@pytest.mark.parametrize("softmax", [True, False])
def test_soups_begin_at_the_mean_and_move_against_the_gradient(
    gpt2: tuple[nn.Module, Path, list[Part]], *, softmax: bool
) -> None:
    model, base, parts = gpt2
    tokenizer = tiny_tokenizer()
    rate = 1e-3
    # All rows in the one batch.
    options = {"softmax": softmax, "batch_size": 5, "learning_rate": rate}
    start = learn("soups", base, parts, steps=0, **options)
    moved = learn("soups", base, parts, steps=1, **options)
    assert isinstance(start, Soups)
    assert isinstance(moved, Soups)
    assert start.weights is not None
    assert moved.weights is not None
    checked = 0
    for module, weights in start.weights.items():
        there = [float(module in part.adapter.modules) for part in in_order(parts)]
        assert weights == pytest.approx([each / sum(there) for each in there])
        for i in (i for i, each in enumerate(there) if each):
            change = moved.weights[module][i] - weights[i]
            if sum(there) < 2 and softmax:
                assert weights[i] == moved.weights[module][i] == 1.0
                continue
            losses = []
            for nudge in (0.05, -0.05):
                nudged = [w + nudge * (i == j) for j, w in enumerate(weights)]
                if softmax:
                    # What one goes up by, the other goes down by.
                    nudged[1 - i] -= nudge
                method = replace(start, weights={**start.weights, module: nudged})
                losses.append(loss(folded(model, merge(parts, method)), tokenizer, ROWS))
            slope = (losses[0] - losses[1]) / 0.1
            if abs(slope) > 5e-4:
                checked += 1
                # AdamW's first step is as long as its rate, whatever the gradient is.
                assert change * slope < 0
                assert abs(change) == pytest.approx(rate / 2 if softmax else rate, rel=0.02)
    assert checked >= 2


def test_soups_of_mini_lose_less_on_the_rows_they_learn_from() -> None:
    model = AutoModelForCausalLM.from_pretrained(MINI.base(), dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(MINI.base())
    parts = parts_of(model, MINI.adapters(), dict.fromkeys(MINI.adapters(), 1.0))[:2]
    rows = {}
    for part in parts:
        every = read_rows(MINI.held_out(part.domain))
        rows[part.domain] = sorted(every, key=lambda row: len(row.question + row.answer))[:5]
    lost = {}
    for softmax, steps in ((True, 0), (True, 6), (False, 6)):
        options = {"softmax": softmax, "steps": steps, "batch_size": 10, "learning_rate": 0.1}
        method = data_method("soups", options, "mini", parts, rows, Reading(max_length=256))
        assert isinstance(method, Soups)
        assert method.weights is not None
        lost[softmax, steps] = loss(folded(model, merge(parts, method)), tokenizer, rows)
        for weights in method.weights.values() if softmax else ():
            assert min(weights) > 0
            assert sum(weights) == pytest.approx(1.0)
    # Without steps both are the mean.
    assert max(lost[True, 6], lost[False, 6]) < lost[True, 0] - 0.02


def test_lorahub_finds_weights_that_lose_less_than_any_on_a_grid(
    gpt2: tuple[nn.Module, Path, list[Part]],
) -> None:
    model, base, parts = gpt2
    tokenizer = tiny_tokenizer()
    method = learn("lorahub", base, parts, evaluations=40, penalty=0.01)
    assert isinstance(method, LoraHub)
    assert method.weights is not None

    def objective(weights: tuple[float, ...]) -> float:
        pairs = merge(parts, replace(method, weights=weights))
        penalty = 0.01 * sum(map(abs, weights)) / len(weights)
        return loss(folded(model, pairs), tokenizer, ROWS) + penalty

    assert max(map(abs, method.weights)) <= 1.5
    grid = product((-1.5, -0.75, 0.0, 0.75, 1.5), repeat=2)
    assert objective(method.weights) <= min(map(objective, grid)) + 1e-4
    assert objective(method.weights) < objective((0.0, 0.0))


@pytest.mark.parametrize("name", list(DATA_METHODS))
def test_the_same_input_gives_the_same_bits_in_any_order(
    name: str, gpt2: tuple[nn.Module, Path, list[Part]]
) -> None:
    _, base, parts = gpt2
    few = {"regmean": {}, "soups": {"steps": 3, "batch_size": 2}, "lorahub": {"evaluations": 8}}
    options: Mapping[str, object] = few[name]
    first = merge(parts, learn(name, base, parts, **options))
    torch.manual_seed(7)
    again = merge(parts[::-1], learn(name, base, parts[::-1], **options))
    assert list(first) == list(again)
    for module, pair in first.items():
        assert all(torch.equal(*both) for both in zip(pair, again[module], strict=True))


def test_a_method_that_learns_is_not_for_those_who_have_no_rows() -> None:
    with pytest.raises(MethodError, match=r"^soups learns from rows: merge offline"):
        read_method("soups", {})


@pytest.mark.parametrize(
    ("name", "options", "rows", "message"),
    [
        ("regmean", {}, {"law": ROWS["law"]}, "regmean needs rows of art: give every domain rows"),
        ("regmean", {}, ROWS | {"tax": ROWS["art"]}, "rows of tax, which is not merged: regmean"),
        ("soups", {}, {}, "soups learns from rows: give it some"),
        ("lorahub", {}, {"law": []}, "lorahub learns from rows: give it some"),
        ("soups", {"weights": 1}, ROWS, "soups has no option 'weights'; its options: softmax, st"),
        ("sum", {}, ROWS, "no method is called 'sum': use regmean, soups, lorahub"),
    ],
)
def test_what_cannot_be_learned_is_refused(
    name: str,
    options: dict[str, object],
    rows: dict[str, list[Row]],
    message: str,
    gpt2: tuple[nn.Module, Path, list[Part]],
) -> None:
    _, base, parts = gpt2
    with pytest.raises(ValueError, match=f"^{message}"):
        data_method(name, options, str(base), parts, rows)


def test_rows_without_an_answer_within_the_length_are_refused(
    gpt2: tuple[nn.Module, Path, list[Part]],
) -> None:
    _, base, parts = gpt2
    reading = Reading(max_length=8, loss_scope="answer")
    with pytest.raises(ValueError, match=r"^law: no answer begins within 8 tokens: raise the len"):
        data_method("soups", {}, str(base), parts, ROWS, reading)

"""Merges of real adapters against PEFT: its tensors of `cat`, and its deltas of everything else."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel
from tests.adapters.merge import dense
from tests.adapters.merge.dense import Matrix
from tests.adapters.merge.making import distance
from tests.adapters.merge.test_definitions import CASES, Definition
from tests.makers import make_adapter, tiny_gpt2, tiny_llama
from torch import nn

from superpose_adapters.layout import Layout, read_layout
from superpose_adapters.merge.cat import Cat
from superpose_adapters.merge.merge import Part, merge
from superpose_adapters.merge.method import Method
from superpose_adapters.peft.folder import read_adapter

# Ranks and scalings of their own, patterns, rsLoRA, and modules that they share in part.
CONFIGS: dict[str, tuple[float, dict[str, Any]]] = {
    "plain": (0.5, {"target_modules": ["c_attn", "c_fc"]}),
    "patterns": (
        -1.5,
        {
            "target_modules": ["c_attn", "attn.c_proj"],
            "rank_pattern": {"h.1.attn.c_attn": 2},
            "alpha_pattern": {"h.0.attn.c_attn": 3},
        },
    ),
    "rslora": (2.0, {"target_modules": ["c_attn"], "r": 3, "use_rslora": True}),
}


def load_all(model: nn.Module, folders: Mapping[str, Path]) -> Any:
    """All adapters in one PEFT model, in float64."""
    wrapped: Any = None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT calls what transformers deprecates
        for name, folder in folders.items():
            if wrapped is None:
                wrapped = PeftModel.from_pretrained(copy.deepcopy(model), folder, adapter_name=name)
            else:
                wrapped.load_adapter(folder, adapter_name=name)
    return wrapped


def parts_of(
    folders: Mapping[str, Path], weights: Mapping[str, float], layout: Layout
) -> list[Part]:
    return [Part(d, read_adapter(folder, layout), weights[d]) for d, folder in folders.items()]


@pytest.fixture(scope="module")
def gpt2() -> nn.Module:
    model: nn.Module = tiny_gpt2(3)
    return model


@pytest.fixture(scope="module")
def folders(gpt2: nn.Module, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {
        name: make_adapter(gpt2, tmp_path_factory.mktemp(name), seed, **config)
        for seed, (name, (_, config)) in enumerate(CONFIGS.items())
    }


@pytest.fixture(scope="module")
def peft_deltas(gpt2: nn.Module, folders: dict[str, Path]) -> dict[str, list[Matrix]]:
    """{module: PEFT's own deltas (out, in) of those adapters that are on it, weighted}."""
    wrapped = load_all(gpt2, folders).double()
    found: dict[str, list[Matrix]] = {}
    for name, module in wrapped.base_model.model.named_modules():
        for adapter, (weight, _) in CONFIGS.items():
            if adapter in getattr(module, "lora_B", {}):
                delta = module.get_delta_weight(adapter).detach().numpy().T  # Conv1D is (in, out).
                found.setdefault(name, []).append(weight * delta)
    return found


@pytest.mark.parametrize(
    ("method", "definition"), CASES, ids=[f"{i}-{m.name}" for i, (m, _) in enumerate(CASES)]
)
def test_what_is_merged_are_the_deltas_that_peft_makes(
    method: Method,
    definition: Definition,
    gpt2: nn.Module,
    folders: dict[str, Path],
    peft_deltas: dict[str, list[Matrix]],
) -> None:
    weights = {name: weight for name, (weight, _) in CONFIGS.items()}
    merged = merge(parts_of(folders, weights, read_layout(gpt2)), method)
    assert sorted(merged) == sorted(peft_deltas)
    assert {len(deltas) for deltas in peft_deltas.values()} == {1, 3}
    for module, (a, b) in merged.items():
        expected = definition(peft_deltas[module])
        if method.name == "mean":  # Of three, on every module.
            expected = dense.plain_sum(peft_deltas[module]) / 3
        assert distance(b.double().numpy() @ a.double().numpy(), expected) < 1e-6


@pytest.mark.parametrize("family", [tiny_gpt2, tiny_llama])
def test_cat_has_the_tensors_of_peft(family: Any, tmp_path: Path) -> None:
    model = family(4)
    modules = (
        (["c_attn"], ["c_attn", "c_fc"])
        if family is tiny_gpt2
        else (["q_proj"], ["q_proj", "up_proj"])
    )
    folders = {
        "one": make_adapter(model, tmp_path / "one", 1, r=4, target_modules=modules[0]),
        "two": make_adapter(
            model, tmp_path / "two", 2, r=2, lora_alpha=5, target_modules=modules[1]
        ),
    }
    weights = {"one": -0.7, "two": 1.3}
    parts = parts_of(folders, weights, read_layout(model))
    merged = merge(parts, Cat())
    names = [p.domain for p in sorted(parts, key=lambda part: part.adapter.digest)]
    wrapped = load_all(model, folders)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        wrapped.add_weighted_adapter(names, [weights[n] for n in names], "sum", "cat")
    checked = 0
    for name, module in wrapped.base_model.model.named_modules():
        if "sum" not in getattr(module, "lora_B", {}):
            assert name not in merged
            continue
        (a, b), rank = merged[name], merged[name][0].shape[0]
        theirs, other = module.lora_A["sum"].weight.data, module.lora_B["sum"].weight.data
        assert module.scaling["sum"] == 1
        assert torch.equal(b, other[:, :rank])
        # PEFT multiplies by weight and scaling in float32, one after the other.
        np.testing.assert_allclose(a.numpy(), theirs[:rank].numpy(), rtol=3e-7, atol=0)
        # Where an adapter is missing PEFT pads to the rank of all.
        assert not theirs[rank:].any()
        assert not other[:, rank:].any()
        checked += 1
    assert checked == len(merged) == 4

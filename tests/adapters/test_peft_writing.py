"""Folders that we write, as PEFT reads them, and as we do."""

from __future__ import annotations

import copy
import errno
import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from peft.utils.other import get_pattern_key
from safetensors import safe_open
from tests.makers import load_peft, tiny_gpt2, tiny_llama
from torch import Tensor, nn

from superpose_adapters import durable
from superpose_adapters.layout import Layout, ModuleLayout, read_layout
from superpose_adapters.peft.folder import CONFIG_NAME, TENSORS_NAME, parse_adapter, read_adapter
from superpose_adapters.peft.writing import adapter_files, write_adapter

IDS = torch.tensor([[5, 17, 200, 3, 99, 42]])
Pairs = dict[str, tuple[Tensor, Tensor]]


def pairs_for(layout: Layout, ranks: dict[str, int], seed: int = 0) -> Pairs:
    torch.manual_seed(seed)
    return {
        module: (
            torch.randn(rank, layout[module].in_features) / 8,
            torch.randn(layout[module].out_features, rank) / 8,
        )
        for module, rank in ranks.items()
    }


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        found: Tensor = copy.deepcopy(model).double()(IDS).logits
    return found


def with_deltas(model: nn.Module, layout: Layout, pairs: Pairs, scaling: float = 1.0) -> nn.Module:
    changed = copy.deepcopy(model).double()
    with torch.no_grad():
        for module, (a, b) in pairs.items():
            delta = scaling * (b.double() @ a.double())
            parameter: Any = changed.get_submodule(module).weight
            parameter += delta.T if layout[module].transposed else delta
    return changed


# Modules of one rank, of several, and layers of which some are left alone.
CASES: dict[str, tuple[Any, dict[str, int]]] = {
    "gpt2, one rank": (
        tiny_gpt2,
        {"transformer.h.0.attn.c_attn": 3, "transformer.h.1.mlp.c_proj": 3},
    ),
    "gpt2, several ranks": (
        tiny_gpt2,
        {
            "transformer.h.0.attn.c_attn": 5,
            "transformer.h.0.mlp.c_proj": 2,
            "transformer.h.1.attn.c_attn": 2,
            "transformer.h.1.attn.c_proj": 1,
        },
    ),
    "llama, several ranks": (
        tiny_llama,
        {
            "model.layers.0.self_attn.q_proj": 2,
            "model.layers.0.mlp.down_proj": 6,
            "model.layers.1.self_attn.q_proj": 4,
            "model.layers.1.self_attn.v_proj": 4,
        },
    ),
}


@pytest.mark.parametrize("scaling", [1.0, -2.5])
@pytest.mark.parametrize(("make", "ranks"), CASES.values(), ids=CASES)
def test_peft_and_we_read_what_was_meant(
    tmp_path: Path, make: Any, ranks: dict[str, int], scaling: float
) -> None:
    model = make()
    layout = read_layout(model)
    pairs = pairs_for(layout, ranks)
    folder = tmp_path / "written"
    write_adapter(folder, *adapter_files(pairs, base="tiny", scaling=scaling))

    expected = logits(with_deltas(model, layout, pairs, scaling))
    assert (expected - logits(model)).abs().max() > 1e-2
    assert (logits(load_peft(model, folder)) - expected).abs().max() < 1e-6
    adapter = read_adapter(folder, layout)
    assert adapter.warnings == ()
    assert {module: factors.rank for module, factors in adapter.modules.items()} == ranks
    for module, factors in adapter.modules.items():
        assert factors.scaling == scaling
        assert torch.equal(factors.a, pairs[module][0])
        assert torch.equal(factors.b, pairs[module][1])


def test_a_name_may_end_in_that_of_another_module() -> None:
    names = ["q", "b.q", "a.b.q", "x.a.b.q", "c.q", "ab.q"]
    layout = {name: ModuleLayout(4, 4, transposed=False) for name in names}
    for ranks in ((1, 2, 1, 1, 1, 1), (1, 1, 2, 1, 1, 3), (2, 1, 1, 1, 2, 1), (1, 2, 3, 4, 5, 6)):
        wanted = dict(zip(names, ranks, strict=True))
        config, tensors = adapter_files(pairs_for(layout, wanted), base=None)
        fields = json.loads(config)
        found = {
            name: fields["rank_pattern"].get(
                get_pattern_key(fields["rank_pattern"].keys(), name), fields["r"]
            )
            for name in names
        }
        assert found == wanted
        adapter = parse_adapter(config, tensors, layout)
        assert {module: factors.rank for module, factors in adapter.modules.items()} == wanted
        assert {factors.scaling for factors in adapter.modules.values()} == {1.0}


def test_the_same_is_the_same_bytes_and_says_what_it_is_told(tmp_path: Path) -> None:
    layout = {"m": ModuleLayout(3, 2, transposed=True)}
    pairs = pairs_for(layout, {"m": 1})
    metadata = {f"key {n}": f'\u00e4 "{n}"' for n in range(8)}
    made = {
        adapter_files(pairs, base="tiny", fan_in_fan_out=True, metadata=metadata) for _ in range(10)
    }
    assert len(made) == 1
    ((config, tensors),) = made
    write_adapter(tmp_path / "one", config, tensors)
    with safe_open(tmp_path / "one" / TENSORS_NAME, "pt") as file:
        assert file.metadata() == {"format": "pt"} | metadata
    fields = json.loads(config)
    assert fields["fan_in_fan_out"] is True
    assert fields["base_model_name_or_path"] == "tiny"
    assert fields["r"] == fields["lora_alpha"] == 1
    # The data begins where a reader may map it.
    assert (8 + int.from_bytes(tensors[:8], "little")) % 8 == 0


def fail_at(monkeypatch: pytest.MonkeyPatch, call: int) -> None:
    """Let the disk be full from the nth wait for it on."""
    waited = 0
    sync = durable.sync

    def full(path: Path) -> None:
        nonlocal waited
        waited += 1
        if waited >= call:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        sync(path)

    monkeypatch.setattr(durable, "sync", full)


@pytest.mark.parametrize("call", [1, 2, 3])
def test_a_full_disk_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: int
) -> None:
    fail_at(monkeypatch, call)
    with pytest.raises(OSError, match="one: cannot be written"):
        write_adapter(tmp_path / "one", b"{}", b"tensors")
    assert list(tmp_path.iterdir()) == []


def test_an_interrupt_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(path: Path) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(durable, "sync", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write_adapter(tmp_path / "one", b"{}", b"tensors")
    assert list(tmp_path.iterdir()) == []


def test_what_is_there_is_replaced_only_if_told_and_never_half(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "one"
    write_adapter(folder, b"{}", b"tensors")
    (folder / "README.md").write_text("mine")
    with pytest.raises(FileExistsError, match="one exists: name another folder, or pass --replace"):
        write_adapter(folder, b"[]", b"others")
    assert (folder / CONFIG_NAME).read_bytes() == b"{}"
    write_adapter(folder, b"[]", b"others", replace=True)
    assert (folder / CONFIG_NAME).read_bytes() == b"[]"
    assert (folder / TENSORS_NAME).read_bytes() == b"others"
    fail_at(monkeypatch, 1)
    with pytest.raises(OSError, match="cannot be written"):
        write_adapter(folder, b"{}", b"tensors", replace=True)
    # No adapter, rather than the files of two.
    assert not (folder / CONFIG_NAME).exists()
    assert (folder / "README.md").read_text() == "mine"
    assert {path.name for path in folder.iterdir()} <= {"README.md", TENSORS_NAME}

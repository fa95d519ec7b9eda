from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from benchmarks.peers.gpt2_checkpoint import read_adapter_config, read_config, read_tensors
from safetensors.torch import load_file, save_file
from tests.makers import save_base, tiny_gpt2


def change(file: Path, **values: object) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


@pytest.fixture
def model() -> Any:
    return tiny_gpt2()


@pytest.fixture
def folder(model: Any, tmp_path: Path) -> Path:
    return save_base(model, tmp_path / "base")


def test_every_matrix_multiplies_as_its_module_does(model: Any, folder: Path) -> None:
    tensors = dict(read_tensors(folder, read_config(folder)))
    x = torch.randn(3, 32, generator=torch.Generator().manual_seed(0))
    for name in ("h.0.attn.c_attn", "h.1.attn.c_proj", "h.1.mlp.c_fc"):
        found = x.numpy() @ tensors[f"{name}.weight"].T + tensors[f"{name}.bias"]
        wanted = model.transformer.get_submodule(name)(x).detach().numpy()
        np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-5)
    ids = torch.tensor([5, 256])
    np.testing.assert_array_equal(tensors["wte.weight"][ids], model.transformer.wte(ids).detach())
    # 2 embeddings, 2 layers of 12 tensors, the last norm; the head is the embedding.
    assert len(tensors) == 2 + 2 * 12 + 2
    assert all(tensor.dtype == np.float32 for tensor in tensors.values())


def test_masks_of_old_checkpoints_and_a_tied_head_are_no_tensors(folder: Path) -> None:
    file = folder / "model.safetensors"
    stored = load_file(file)
    before = dict(read_tensors(folder, read_config(folder)))
    more = {
        "transformer.h.0.attn.bias": torch.ones(1, 1, 8, 8),
        "transformer.h.1.attn.masked_bias": torch.tensor(-1e4),
        "lm_head.weight": torch.zeros(257, 32),
    }
    save_file(stored | more, file)
    assert dict(read_tensors(folder, read_config(folder))).keys() == before.keys()
    change(folder / "config.json", tie_word_embeddings=False)
    head = dict(read_tensors(folder, read_config(folder)))["lm_head.weight"]
    assert head.shape == (257, 32)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"model_type": "llama"}, "only GPT-2 with gelu_new"),
        ({"activation_function": "relu"}, "only GPT-2 with gelu_new"),
        ({"scale_attn_by_inverse_layer_idx": True}, "usual scaling"),
        ({"scale_attn_weights": False}, "usual scaling"),
    ],
)
def test_what_converters_would_get_wrong_is_refused(
    folder: Path, values: dict[str, object], message: str
) -> None:
    change(folder / "config.json", **values)
    with pytest.raises(ValueError, match=message):
        read_config(folder)


@pytest.mark.parametrize(
    ("key", "value"),
    [("use_dora", True), ("use_rslora", True), ("bias", "all"), ("rank_pattern", {"c_fc": 2})],
)
def test_an_adapter_with_more_to_it_than_a_scaled_product_is_refused(
    adapters: Path, tmp_path: Path, key: str, value: object
) -> None:
    written = (adapters / "domain-000" / "adapter_config.json").read_text()
    file = tmp_path / "adapter_config.json"
    file.write_text(written)
    assert read_adapter_config(tmp_path)["r"] == 4
    change(file, **{key: value})
    with pytest.raises(ValueError, match=f"{key}="):
        read_adapter_config(tmp_path)

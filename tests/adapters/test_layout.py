from __future__ import annotations

import torch
from tests.makers import tiny_gpt2, tiny_llama

from superpose_adapters.layout import ModuleLayout, read_layout


def test_gpt2_modules_are_transposed_and_the_head_is_tied() -> None:
    layout = read_layout(tiny_gpt2())
    blocks = [f"transformer.h.{i}." for i in range(2)]
    names = ["attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"]
    assert set(layout) == {b + n for b in blocks for n in names} | {"lm_head"}
    assert layout["transformer.h.0.attn.c_attn"] == ModuleLayout(32, 96, transposed=True)
    assert layout["transformer.h.1.mlp.c_proj"] == ModuleLayout(128, 32, transposed=True)
    assert layout["lm_head"] == ModuleLayout(32, 257, transposed=False, tied=True, head=True)


def test_llama_modules_are_linear_and_k_is_narrower_than_q() -> None:
    layout = read_layout(tiny_llama())
    assert layout["model.layers.0.self_attn.q_proj"] == ModuleLayout(32, 32, transposed=False)
    assert layout["model.layers.1.self_attn.k_proj"] == ModuleLayout(32, 16, transposed=False)
    assert layout["model.layers.1.mlp.down_proj"] == ModuleLayout(48, 32, transposed=False)
    assert layout["lm_head"] == ModuleLayout(32, 257, transposed=False, tied=False, head=True)
    assert read_layout(tiny_llama(tie_word_embeddings=True))["lm_head"].tied


def test_delta_takes_the_shape_of_the_parameter() -> None:
    for model in (tiny_gpt2(), tiny_llama()):
        modules = dict(model.named_modules())
        for name, entry in read_layout(model).items():
            product = torch.zeros(entry.out_features, entry.in_features)
            assert entry.delta(product).shape == modules[name].weight.shape

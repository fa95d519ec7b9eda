"""Small twins of bases: what they keep, and that they show what they are made to show."""

from __future__ import annotations

from copy import deepcopy
from functools import cache
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from transformers import PreTrainedConfig

from superpose_server.model.miniature import (
    SWITCH,
    WINDOW,
    MiniatureError,
    make_miniature,
    miniature,
)

_LLAMA_3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
_LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "short_factor": [1.0 + i / 40 for i in range(48)],
    "long_factor": [1.5 + i for i in range(48)],
    "original_max_position_embeddings": 4096,
}
_YARN = {
    "rope_type": "yarn",
    "rope_theta": 150000.0,
    "factor": 32.0,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "truncate": False,
    "original_max_position_embeddings": 4096,
}


def _shape(
    hidden: int, inner: int, layers: int, heads: int, key_heads: int, words: int, **more: Any
) -> dict[str, Any]:
    return {
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": key_heads,
        "vocab_size": words,
        **more,
    }


# As published, but for what does not matter here.
SHAPES: dict[str, tuple[str, dict[str, Any]]] = {
    "gpt2": ("GPT2", {}),
    "opt-350m": (
        "OPT",
        {
            "hidden_size": 1024,
            "word_embed_proj_dim": 512,
            "ffn_dim": 4096,
            "num_hidden_layers": 24,
            "num_attention_heads": 16,
            "do_layer_norm_before": False,
        },
    ),
    "gpt-neo-1.3b": ("GPTNeo", {}),
    "mpt-7b": (
        "Mpt",
        {"d_model": 4096, "n_heads": 32, "n_layers": 32, "attn_config": {"clip_qkv": 8.0}},
    ),
    "llama-3-8b": (
        "Llama",
        _shape(
            4096,
            14336,
            32,
            32,
            8,
            128256,
            max_position_embeddings=131072,
            rope_parameters=_LLAMA_3_ROPE,
            bos_token_id=128000,
            eos_token_id=[128001, 128008],
        ),
    ),
    "smollm2-360m": (
        "Llama",
        _shape(960, 2560, 32, 15, 5, 49152, tie_word_embeddings=True, rms_norm_eps=1e-5),
    ),
    "mistral-7b": ("Mistral", _shape(4096, 14336, 32, 32, 8, 32000, sliding_window=4096)),
    "qwen2.5-7b": (
        "Qwen2",
        _shape(
            3584,
            18944,
            28,
            28,
            4,
            152064,
            use_sliding_window=False,
            max_window_layers=28,
            bos_token_id=151643,
        ),
    ),
    "qwen2, some layers slide": (
        "Qwen2",
        _shape(
            3584,
            18944,
            28,
            28,
            4,
            152064,
            use_sliding_window=True,
            sliding_window=4096,
            max_window_layers=20,
        ),
    ),
    "gemma-2-9b": (
        "Gemma2",
        _shape(3584, 14336, 42, 16, 8, 256000, head_dim=256, sliding_window=4096),
    ),
    "gemma-3-27b": (
        "Gemma3",
        _shape(
            5376,
            21504,
            62,
            32,
            16,
            262208,
            head_dim=128,
            query_pre_attn_scalar=168,
            sliding_window=1024,
            rope_parameters={
                "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
                "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
            },
        ),
    ),
    "phi-3-mini-128k": (
        "Phi3",
        _shape(
            3072,
            8192,
            32,
            32,
            32,
            32064,
            max_position_embeddings=131072,
            original_max_position_embeddings=4096,
            rope_parameters=_LONGROPE,
            sliding_window=262144,
            pad_token_id=32000,
        ),
    ),
    "gpt-oss-20b": (
        "GptOss",
        _shape(
            2880,
            2880,
            24,
            64,
            8,
            201088,
            head_dim=64,
            sliding_window=128,
            num_local_experts=32,
            num_experts_per_tok=4,
            max_position_embeddings=131072,
            rope_parameters=_YARN,
        ),
    ),
    "olmo-3-7b": (
        "Olmo3",
        _shape(
            4096,
            11008,
            32,
            32,
            32,
            100278,
            sliding_window=4096,
            pad_token_id=100277,
            layer_types=(["sliding_attention"] * 3 + ["full_attention"]) * 8,
        ),
    ),
    "command-r7b": (
        "Cohere2",
        _shape(4096, 14336, 32, 32, 8, 256000, logit_scale=0.25, sliding_window=4096),
    ),
    "granite-3-8b": (
        "Granite",
        _shape(
            4096,
            12800,
            40,
            32,
            8,
            49155,
            tie_word_embeddings=True,
            attention_multiplier=0.0078125,
            embedding_multiplier=12.0,
            residual_multiplier=0.22,
            logits_scaling=16.0,
        ),
    ),
    "qwen3-30b": (
        "Qwen3Moe",
        _shape(
            2048,
            6144,
            48,
            32,
            4,
            151936,
            head_dim=128,
            num_experts=128,
            num_experts_per_tok=8,
            moe_intermediate_size=768,
            mlp_only_layers=[3],
        ),
    ),
    "deepseek-v3": ("DeepseekV3", {}),
}
_CLASSES = {"GPT2": "GPT2LMHeadModel"}
_CONFIGS = {"Gemma3": "Gemma3TextConfig"}
_WINDOWS = ("sliding_window", "window_size")


def base(shape: str) -> tuple[type[Any], PreTrainedConfig]:
    family, fields = SHAPES[shape]
    model_class = getattr(transformers, _CLASSES.get(family, f"{family}ForCausalLM"))
    return model_class, getattr(transformers, _CONFIGS.get(family, f"{family}Config"))(
        **deepcopy(fields)
    )


@cache
def twin(shape: str) -> Any:
    """Return the twin of a shape, which no test changes."""
    return make_miniature(*base(shape))


def text(length: int = 30) -> Tensor:
    return torch.randint(20, 180, (1, length), generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def logits(module: nn.Module, ids: Tensor) -> Tensor:
    found: Tensor = module(input_ids=ids, use_cache=False).logits
    return found[0]


def changed(module: nn.Module, other: nn.Module, ids: Tensor) -> float:
    """Return by how much the last token's logits differ, as a share of their deviation."""
    expected = logits(module, ids)[-1]
    return float((expected - logits(other, ids)[-1]).std() / expected.std())


def with_field(module: Any, field: str, value: Any) -> Any:
    """Return the same model under a configuration that differs in one field."""
    config = deepcopy(module.config)
    setattr(config, field, value)
    other = type(module)._from_config(config, attn_implementation="eager").eval()
    other.load_state_dict(module.state_dict())
    return other


def values(field: Any) -> Any:
    """Return a field without what is, or depends on, a size."""
    if isinstance(field, dict):
        return {key: values(value) for key, value in field.items() if key != "dtype"}
    return None if type(field) in (int, list) else field


@pytest.mark.parametrize("shape", SHAPES)
def test_a_twin_is_small_and_keeps_what_is_not_a_size(shape: str) -> None:
    model_class, config = base(shape)
    before, state = config.to_dict(), torch.get_rng_state()
    module: Any = make_miniature(model_class, config)
    assert config.to_dict() == before
    assert torch.equal(torch.get_rng_state(), state)

    assert type(module) is model_class
    assert not module.training
    assert {parameter.dtype for parameter in module.parameters()} == {torch.float32}
    assert sum(parameter.numel() for parameter in module.parameters()) < 10_000_000
    found = logits(module, text())
    assert 0.1 < found.std() < 10

    small = module.config
    assert 2 <= small.num_hidden_layers <= 6
    assert small.num_attention_heads >= 2
    for name, value in before.items():
        if name in _WINDOWS:
            assert getattr(small, name) == (value and WINDOW)
        elif name == "layer_types" and value:
            assert set(small.layer_types) == set(value)
            assert len(small.layer_types) == small.num_hidden_layers
        elif name not in ("dtype", "architectures"):
            assert values(small.to_dict()[name]) == values(value), name


@pytest.mark.parametrize("shape", ["gpt2", "gpt-oss-20b"])
def test_the_same_seed_gives_the_same_twin(shape: str) -> None:
    assert changed(twin(shape), make_miniature(*base(shape)), text()) == 0
    assert changed(twin(shape), make_miniature(*base(shape), seed=1), text()) > 0.1


def test_groups_of_heads_experts_and_kinds_of_layers_are_kept() -> None:
    llama = miniature(base("llama-3-8b")[1])
    assert (llama.num_attention_heads, llama.num_key_value_heads, llama.head_dim) == (4, 2, 128)
    assert llama.rope_parameters == _LLAMA_3_ROPE
    special = [llama.bos_token_id, *llama.eos_token_id]
    assert max(special) < llama.vocab_size < 200
    assert len(set(special)) == 3

    assert miniature(base("gpt-neo-1.3b")[1]).attention_layers == ["global", "local"] * 2

    qwen3 = miniature(base("qwen3-30b")[1])
    assert (qwen3.num_hidden_layers, qwen3.mlp_only_layers) == (3, [1])
    assert 1 < qwen3.num_experts_per_tok < qwen3.num_experts

    deepseek = miniature(base("deepseek-v3")[1])
    assert (deepseek.first_k_dense_replace, deepseek.num_hidden_layers) == (2, 4)


@pytest.mark.parametrize("shape", ["gpt2", "gemma-2-9b", "phi-3-mini-128k", "granite-3-8b"])
def test_rounding_is_far_below_what_shows(shape: str) -> None:
    module = twin(shape)
    rough = logits(module, text())
    exact = logits(deepcopy(module).double(), text())
    assert (rough - exact).abs().max() / exact.std() < 1e-4


@pytest.mark.parametrize("shape", SHAPES)
def test_every_token_in_reach_shows(shape: str) -> None:
    module = twin(shape)
    ids = text(WINDOW)
    for position in range(WINDOW - 1):
        other = ids.clone()
        other[0, position] = 181
        found, expected = logits(module, other)[-1], logits(module, ids)[-1]
        assert (found - expected).std() / expected.std() > 0.01, position


@pytest.mark.parametrize(
    ("shape", "field"),
    [
        ("mistral-7b", "sliding_window"),
        ("gpt-neo-1.3b", "window_size"),
        ("qwen2, some layers slide", "sliding_window"),
        ("gemma-2-9b", "sliding_window"),
        ("gemma-3-27b", "sliding_window"),
        ("gpt-oss-20b", "sliding_window"),
        ("olmo-3-7b", "sliding_window"),
        ("command-r7b", "sliding_window"),
    ],
)
def test_a_window_that_is_one_wider_shows(shape: str, field: str) -> None:
    module = twin(shape)
    assert changed(module, with_field(module, field, WINDOW + 1), text()) > 0.05
    # And not before a token is out of reach.
    assert changed(module, with_field(module, field, WINDOW + 1), text(WINDOW)) < 1e-5


@pytest.mark.parametrize("field", ["attn_logit_softcapping", "final_logit_softcapping"])
def test_a_missing_cap_shows(field: str) -> None:
    module = twin("gemma-2-9b")
    assert changed(module, with_field(module, field, None), text()) > 0.002


def test_missing_sinks_show() -> None:
    module = twin("gpt-oss-20b")
    other = deepcopy(module)
    for name, parameter in other.named_parameters():
        if name.endswith("sinks"):
            parameter.zero_()
    assert changed(module, other, text()) > 0.05


def test_longer_texts_than_those_trained_on_show() -> None:
    module = twin("phi-3-mini-128k")
    rope = module.config.rope_parameters
    assert rope["original_max_position_embeddings"] == SWITCH
    assert rope["long_factor"] == _LONGROPE["long_factor"]
    other = with_field(module, "rope_parameters", rope | {"long_factor": rope["short_factor"]})
    assert changed(module, other, text(SWITCH)) == 0
    assert changed(module, other, text(SWITCH + 1)) > 0.05


def test_a_class_that_takes_no_narrow_shape_gets_a_wider_one() -> None:
    config = transformers.HeliumConfig(num_hidden_layers=30)
    module: Any = make_miniature(transformers.HeliumForCausalLM, config)
    assert module.config.head_dim == config.head_dim
    assert module.config.hidden_size == config.head_dim * module.config.num_attention_heads


def test_what_cannot_be_made_says_why_in_one_line() -> None:
    class Stubborn(transformers.GPT2LMHeadModel):  # type: ignore[misc]
        def forward(self, **_: Any) -> None:
            raise RuntimeError("not\nwith me")

    with pytest.raises(MiniatureError, match=r"Stubborn can be made: RuntimeError: not with me$"):
        make_miniature(Stubborn, transformers.GPT2Config(n_embd=64, n_head=2))

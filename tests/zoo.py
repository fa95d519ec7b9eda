"""One tiny seeded model of every causal language model type that transformers can build.

Written by hand from the types' own configurations, independently of the code under test. `ZOO`
has one entry for each key of `MODEL_FOR_CAUSAL_LM_MAPPING_NAMES` and, as `type/variant`, entries
for the options of a family that change what its model computes; `UNBUILT` has the other types.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, field
from typing import Any

import torch
from tests.makers import EOS_ID, VOCABULARY
from torch import nn
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig, AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

# A configuration gets those of these fields that its class has, unless its entry says otherwise.
_WIDTH, _INNER, _NARROW = 32, 48, 24
_TINY: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "eos_token_id": EOS_ID,
    "bos_token_id": EOS_ID,
    "pad_token_id": None,
    "tie_word_embeddings": False,
    # Layers
    **dict.fromkeys(["num_hidden_layers", "n_layer", "n_layers", "num_layers", "num_blocks"], 2),
    **dict.fromkeys(["encoder_layers", "decoder_layers"], 2),
    **dict.fromkeys(["num_encoder_layers", "num_decoder_layers"], 2),
    # Widths
    **dict.fromkeys(["hidden_size", "d_model", "n_embd", "emb_dim", "embedding_dim"], _WIDTH),
    **dict.fromkeys(
        ["intermediate_size", "ffn_dim", "n_inner", "dff", "dim_ff", "d_inner"], _INNER
    ),
    **dict.fromkeys(["encoder_ffn_dim", "decoder_ffn_dim", "ffn_hidden_size"], _INNER),
    "embedding_size": 16,
    "hidden_size_global": _WIDTH,
    # Heads
    **dict.fromkeys(["num_attention_heads", "n_head", "n_heads", "num_heads"], 4),
    **dict.fromkeys(["attention_heads", "encoder_attention_heads", "decoder_attention_heads"], 4),
    **dict.fromkeys(["num_encoder_attention_heads", "num_decoder_attention_heads"], 4),
    **dict.fromkeys(["num_key_value_heads", "num_kv_heads"], 2),
    **dict.fromkeys(["head_dim", "dim_head", "d_head", "qk_nope_head_dim", "qk_rope_head_dim"], 8),
    "v_head_dim": 12,
    "rotary_dim": 4,
    **dict.fromkeys(["q_lora_rank", "kv_lora_rank"], 16),
    "index_topk": 8,
    "index_head_dim": 8,
    "index_n_heads": 8,
    # Experts
    **dict.fromkeys(["num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"], 4),
    **dict.fromkeys(["num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_k"], 2),
    **dict.fromkeys(["n_shared_experts", "num_shared_experts", "moe_num_shared_experts"], 1),
    **dict.fromkeys(["moe_intermediate_size", "shared_expert_intermediate_size"], _NARROW),
    **dict.fromkeys(["n_group", "num_expert_group", "topk_group", "first_k_dense_replace"], 1),
    "routed_scaling_factor": 1.5,
    "shared_intermediate_size": _NARROW,
    # Positions
    **dict.fromkeys(["max_position_embeddings", "n_positions", "n_ctx", "max_seq_len"], 128),
    **dict.fromkeys(["model_max_length", "max_target_positions", "context_length"], 128),
    **dict.fromkeys(["sliding_window", "window_size"], 8),
    # State spaces
    **dict.fromkeys(["mamba_d_state", "state_size", "mamba_n_heads", "mamba_d_head"], 8),
    **dict.fromkeys(["mamba_chunk_size", "chunk_size", "linear_head_dim"], 8),
    **dict.fromkeys(["linear_key_head_dim", "linear_value_head_dim"], 8),
    **dict.fromkeys(["mamba_dt_rank", "time_step_rank"], 4),
    "linear_num_heads": 4,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    # Scales
    "swiglu_limit": 1.0,
    "final_logit_softcapping": 3.0,
    "attn_logit_softcapping": 2.0,
    "scale_embedding": True,
}


@dataclass(frozen=True)
class Specimen:
    """How to build one tiny model, and what it is.

    Attributes:
        name: The model type, or `type/variant`.
        kind: What transformers' own model does:
            decoder: logits depend on the text up to them; update() of a cache is all it needs
            encoder-decoder: the decoder's half of one, a decoder by itself
            stateful: recurrent or convolutional states beside or instead of keys and values
            indexed: picks the tokens to attend to, or compresses them
            length: a decoder whose logits depend on the length of the whole text
            no cache, chunked, bidirectional, not causal, multimodal: as it says
        targets: Last parts of the names of plain nn.Linear and Conv1D modules to adapt.
        config: Fields of its configuration beside `_TINY`.
        note: What a reader should know.
    """

    name: str
    kind: str = "decoder"
    targets: tuple[str, ...] = ()
    config: dict[str, Any] = field(default_factory=dict)
    note: str = ""

    @property
    def model_type(self) -> str:
        return self.name.partition("/")[0]


_LLAMA = "q_proj k_proj v_proj o_proj gate_proj up_proj down_proj"
_ATTENTION = "q_proj k_proj v_proj o_proj"
_UP_DOWN = "q_proj k_proj v_proj o_proj up_proj down_proj"
_FUSED = "q_proj k_proj v_proj o_proj gate_up_proj down_proj"
_BART = "q_proj k_proj v_proj out_proj fc1 fc2"
_BERT = "query key value dense"
_BLOOM = "query_key_value dense dense_h_to_4h dense_4h_to_h"
_GPT2 = "c_attn c_proj c_fc"
_MLA = "q_a_proj q_b_proj kv_a_proj_with_mqa kv_b_proj o_proj gate_proj up_proj down_proj"
_LATENT = "q_a_proj q_b_proj kv_a_proj_with_mqa kv_b_proj o_proj"


def _s(
    name: str, kind: str = "decoder", targets: str = _LLAMA, note: str = "", **config: Any
) -> Specimen:
    return Specimen(name, kind, tuple(targets.split()), config, note)


_MIXED: dict[str, Any] = {"layer_types": ["sliding_attention", "full_attention"]}
_MOE: dict[str, Any] = {"mlp_layer_types": ["dense", "sparse"]}
_GROUPS: dict[str, Any] = {"n_group": 2, "topk_group": 1}
_HYBRID: dict[str, Any] = {"layer_types": ["linear_attention", "full_attention"]}
_GRANITE: dict[str, Any] = {
    "embedding_multiplier": 2.0,
    "logits_scaling": 0.5,
    "residual_multiplier": 0.7,
    "attention_multiplier": 0.6,
}


_TEXT: dict[str, Any] = {"vision_config": None, "audio_config": None}
_DOTS: dict[str, Any] = {
    "layer_types": ["sliding_attention", "indexed_attention"],
    "head_dim": 16,
    "num_key_value_heads": 4,
    "shared_experts_intermediate_size": _NARROW,
    "swa_num_attention_heads": 4,
    "swa_num_key_value_heads": 4,
    "swa_q_lora_rank": 16,
    "swa_kv_lora_rank": 16,
    "swa_head_dim": 16,
    "swa_qk_nope_head_dim": 8,
    "swa_v_head_dim": 12,
    **_MOE,
}
_LLAMA4: dict[str, Any] = {
    "no_rope_layers": [1, 0],
    "attention_chunk_size": 8,
    "intermediate_size_mlp": _INNER,
    "floor_scale": 8,
    "num_experts_per_tok": 1,
}
_PARTIAL: dict[str, Any] = {
    "rope_parameters": {"rope_type": "default", "rope_theta": 100.0, "partial_rotary_factor": 0.5}
}
_QWEN4: dict[str, Any] = {
    "layer_types": ["linear_attention", "indexed_attention"],
    "hc_count": 2,
    "hc_lowrank": 8,
    "indexer_n_heads": 2,
    "indexer_kv_heads": 1,
    "indexer_head_dim": 8,
    "indexer_budget": 8,
    "indexer_compress_ratio": 2,
}


def _rope(rope_type: str, **fields: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": rope_type, "rope_theta": 100.0, **fields}}


def _bert(name: str, **config: Any) -> tuple[Specimen, Specimen]:
    return (
        _s(name, "decoder", _BERT, is_decoder=True, **config),
        _s(f"{name}/encoder", "bidirectional", _BERT, is_decoder=False, **config),
    )


# fmt: off
_SPECIMENS: tuple[Specimen, ...] = (
    _s("afmoe", targets=_ATTENTION, num_dense_layers=1, mup_enabled=True, route_scale=1.5,
        **_MIXED),
    _s("apertus", targets=_UP_DOWN,
        **_rope("llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
            original_max_position_embeddings=32)),
    _s("arcee", targets=_UP_DOWN),
    _s("aria_text"),
    _s("axk1", targets=_MLA, num_key_value_heads=4, **_MOE, **_GROUPS),
    _s("axk2", "indexed",
        targets="q_a_proj q_gate_proj kv_a_proj_with_mqa kv_b_proj o_proj down_proj",
        num_key_value_heads=4, gated_norm_rank=4, **_MOE),
    _s("bailing_hybrid", "stateful",
        targets="q_proj k_proj v_proj o_proj kv_a_proj_with_mqa kv_b_proj", num_key_value_heads=4,
        layer_group_size=2),
    _s("bamba", "stateful", note="without position_ids its own cached steps all see position 0",
        attn_layer_indices=[1]),
    _s("bart", "encoder-decoder", targets=_BART),
    _s("beam", targets=_ATTENTION, **_MIXED, **_MOE, **_GROUPS),
    *_bert("bert"),
    *_bert("bert-generation"),
    *_bert("big_bird"),
    _s("bigbird_pegasus", "encoder-decoder", targets=_BART),
    _s("biogpt", targets=_BART),
    _s("bitnet"),
    _s("blenderbot", "encoder-decoder", targets=_BART),
    _s("blenderbot-small", "encoder-decoder", targets=_BART),
    _s("bloom", targets=_BLOOM),
    _s("blt", "no cache", note="patches by entropy; it cannot make its own cache; NaN in float64",
        encoder_hash_byte_group_vocab=64, use_cache=False),
    *_bert("camembert", pad_token_id=0),
    _s("codegen", targets="qkv_proj out_proj fc_in fc_out"),
    _s("cohere", logit_scale=0.5),
    _s("cohere/qk-norm", logit_scale=0.5, use_qk_norm=True),
    _s("cohere2", logit_scale=0.5, **_MIXED),
    _s("cohere2_moe", targets=_ATTENTION, logit_scale=0.5, **_MIXED, **_MOE),
    _s("cohere_compass_text",
        rope_parameters={
            "sliding_attention": {"rope_type": "default", "rope_theta": 100.0,
                "mrope_section": [2, 1, 1]}, "full_attention": None}, **_MIXED),
    _s("cpmant", "bidirectional",
        targets="project_q project_k project_v attention_out w_0 w_1 w_out",
        note="its prompt and text attend both ways, and it cannot use its own cache",
        prompt_length=4, prompt_types=4),
    _s("ctrl", targets="Wq Wk Wv dense"),
    _s("cwm", **_MIXED),
    *_bert("data2vec-text", pad_token_id=0),
    _s("dbrx", targets="Wqkv out_proj",
        attn_config={"kv_n_heads": 2, "clip_qkv": 1.0, "rope_theta": 100.0},
        ffn_config={"hidden_size": _WIDTH, "ffn_hidden_size": _NARROW, "moe_top_k": 2}),
    _s("deepseek_v2", targets=_LATENT, num_key_value_heads=4),
    _s("deepseek_v2/no-q-lora", targets="q_proj kv_a_proj_with_mqa kv_b_proj o_proj",
        num_key_value_heads=4, q_lora_rank=None, topk_method="group_limited_greedy", **_GROUPS),
    _s("deepseek_v3", targets=_LATENT, num_key_value_heads=4, **_GROUPS),
    _s("deepseek_v32", "indexed", targets=_LATENT, num_key_value_heads=4, **_GROUPS, **_MOE),
    _s("deepseek_v4", "indexed", targets="q_a_proj q_b_proj kv_proj o_b_proj",
        compress_rates={"compressed_sparse_attention": 2, "heavily_compressed_attention": 4},
        hc_mult=2, o_groups=2, o_lora_rank=8, num_hidden_layers=3, head_dim=16,
        partial_rotary_factor=0.5, rope_theta=100.0, compress_rope_theta=1000.0,
        layer_types=["heavily_compressed_attention", "compressed_sparse_attention",
            "sliding_attention"], mlp_layer_types=["hash_moe", "moe", "moe"]),
    _s("diffllama"),
    _s("doge", "indexed", note="keeps the keys of the largest gates of the whole text",
        sliding_window=None, keep_window_size=8),
    _s("doge/window"),
    _s("doge/moe", "not causal", note="a split mixes the logits of its router across tokens",
        sliding_window=None, keep_window_size=8, is_moe=True),
    _s("dots1", targets=_ATTENTION, **_MIXED),
    _s("dots3_note", "indexed", targets=_MLA, text_config=_DOTS,
        vision_config={"adapter_in_dim": _WIDTH, "adapter_out_dim": _WIDTH,
            "mlp_layer_types": ["dense", "dense"]},
        audio_config={"adapter_input_size": _WIDTH, "adapter_out_dim": _WIDTH}),
    _s("dots3_note_text", "indexed", targets=_MLA, **_DOTS),
    *_bert("electra"),
    _s("emu3", note="saves its text config, which AutoModelForCausalLM does not know",
        text_config={"pad_token_id": 0}),
    *_bert("ernie"),
    _s("ernie4_5"),
    _s("ernie4_5_moe", targets=_ATTENTION, moe_layer_start_index=1, moe_layer_end_index=1),
    _s("exaone4", **_MIXED),
    _s("exaone_moe", targets=_ATTENTION, **_MIXED, **_MOE),
    _s("falcon", targets=_BLOOM),
    _s("falcon/alibi", targets=_BLOOM, note="eager adds alibi twice; sdpa is right", alibi=True),
    _s("falcon/multi-head", targets=_BLOOM, multi_query=False, num_kv_heads=4, parallel_attn=False,
        bias=True),
    _s("falcon/new", targets=_BLOOM, new_decoder_architecture=True),
    _s("falcon_h1", "stateful", mamba_d_ssm=64, lm_head_multiplier=0.5, embedding_multiplier=2.0,
        mlp_multipliers=[0.7, 1.4], key_multiplier=1.5, attention_out_multiplier=1.3,
        attention_in_multiplier=0.8, ssm_multipliers=[0.9, 1.2, 0.8, 1.1, 1.3],
        ssm_in_multiplier=1.2, ssm_out_multiplier=0.8),
    _s("falcon_mamba", "stateful", targets="in_proj x_proj dt_proj"),
    _s("flex_olmo", targets=_ATTENTION),
    _s("flint", mlp_only_layers=[0], **_MIXED),
    _s("fuyu", "multimodal", targets=_BLOOM),
    _s("gemma"),
    _s("gemma2", query_pre_attn_scalar=4, **_MIXED),
    _s("gemma3", "multimodal", text_config={"query_pre_attn_scalar": 4, **_MIXED}),
    _s("gemma3_text", query_pre_attn_scalar=4, **_MIXED),
    _s("gemma3n_text", num_hidden_layers=4,
        layer_types=["sliding_attention", "full_attention"] * 2, num_kv_shared_layers=2,
        hidden_size_per_layer_input=8, vocab_size_per_layer_input=VOCABULARY, laurel_rank=8,
        altup_num_inputs=2, activation_sparsity_pattern=[0.5, 0.5, 0.0, 0.0]),
    _s("gemma4", "multimodal",
        text_config={"pad_token_id": 0, "hidden_size_per_layer_input": 8,
            "vocab_size_per_layer_input": VOCABULARY, "global_head_dim": 16, **_MIXED}, **_TEXT),
    _s("gemma4_text", num_hidden_layers=4, layer_types=["sliding_attention", "full_attention"] * 2,
        num_kv_shared_layers=2, hidden_size_per_layer_input=8,
        vocab_size_per_layer_input=VOCABULARY, global_head_dim=16),
    _s("gemma4_text/experts", targets=_ATTENTION, hidden_size_per_layer_input=0,
        vocab_size_per_layer_input=0, global_head_dim=16, enable_moe_block=True, top_k_experts=2,
        attention_k_eq_v=True, num_global_key_value_heads=1, **_MIXED),
    _s("gemma4_unified", "multimodal",
        text_config={"pad_token_id": 0, "global_head_dim": 16, **_MIXED}, **_TEXT),
    _s("gemma4_unified_text", global_head_dim=16, **_MIXED),
    _s("git", "multimodal", targets=_BERT),
    _s("glm", targets=_FUSED),
    _s("glm4", targets=_FUSED),
    _s("glm4_moe", targets=_ATTENTION),
    _s("glm4_moe_lite", targets=_LATENT, num_key_value_heads=4, **_MOE),
    _s("glm_moe_dsa", "indexed", targets=_LATENT, num_key_value_heads=4, **_MOE),
    _s("got_ocr2", "multimodal",
        vision_config={"output_channels": 8, "image_size": 64, "mlp_dim": _INNER}),
    _s("gpt-sw3", targets=_GPT2),
    _s("gpt2", targets=_GPT2),
    _s("gpt2/scales", targets=_GPT2, scale_attn_by_inverse_layer_idx=True),
    _s("gpt_bigcode", targets=_GPT2),
    _s("gpt_bigcode/multi-head", targets=_GPT2, multi_query=False),
    _s("gpt_neo", targets="q_proj k_proj v_proj out_proj c_fc c_proj",
        attention_types=[[["global", "local"], 1]]),
    _s("gpt_neox", targets=_BLOOM, **_PARTIAL),
    _s("gpt_neox/sequential", targets=_BLOOM, use_parallel_residual=False, **_PARTIAL),
    _s("gpt_neox_japanese", targets=_BLOOM, intermediate_multiple_size=2),
    _s("gpt_oss", targets=_ATTENTION, **_MIXED),
    _s("gptj", targets="q_proj k_proj v_proj out_proj fc_in fc_out"),
    _s("granite", **_GRANITE),
    _s("granite_swa", layer_rope_theta=[100.0, 1000.0], **_MIXED, **_GRANITE),
    _s("granitemoe", targets=_ATTENTION, **_GRANITE),
    _s("granitemoe_swa", targets="q_proj k_proj v_proj o_proj input_linear output_linear",
        layer_rope_theta=[100.0, 1000.0], **_MIXED, **_GRANITE),
    _s("granitemoehybrid", "stateful",
        targets="q_proj k_proj v_proj o_proj input_linear output_linear",
        position_embedding_type="rope", **_HYBRID, **_GRANITE),
    _s("granitemoeshared", targets="q_proj k_proj v_proj o_proj input_linear output_linear",
        **_GRANITE),
    _s("helium"),
    _s("hrm_text", num_hidden_layers=1, L_cycles=2),
    _s("hunyuan_v1_dense"),
    _s("hunyuan_v1_moe", targets=_ATTENTION),
    _s("hy_v3", router_scaling_factor=1.5, **_MOE),
    _s("hy_v4", "indexed", targets=_LATENT, hc_mult=2, **_MOE),
    _s("hyperclovax", **_GRANITE),
    _s("inkling2_text", "stateful", targets=_ATTENTION,
        note="its router is float32 in a float64 model, so that cannot run",
        swa_num_attention_heads=4, swa_num_key_value_heads=2, swa_head_dim=8,
        sliding_window_size=8, d_rel=4, rel_extent=16, layer_types=["hybrid_sliding", "hybrid"],
        unpadded_vocab_size=VOCABULARY, log_scaling_n_floor=16, n_layers_per_attn_res_block=1),
    _s("inkling_text", "stateful", swa_num_attention_heads=4, swa_num_key_value_heads=2,
        swa_head_dim=8, sliding_window_size=8, d_rel=4, rel_extent=16,
        layer_types=["hybrid_sliding", "hybrid"], logits_mup_width_multiplier=2.0,
        log_scaling_n_floor=16, **_MOE),
    _s("internlm3"),
    _s("iquestcoder"),
    _s("jais2", targets=_UP_DOWN),
    _s("jamba", "stateful", attn_layer_period=2, attn_layer_offset=1),
    _s("jetmoe", targets="kv_proj", kv_channels=8),
    _s("kimi_linear", "stateful",
        targets="q_proj k_proj v_proj o_proj kv_a_proj_with_mqa kv_b_proj", num_key_value_heads=4,
        **_HYBRID, **_MOE),
    _s("kolibri1", **_MIXED),
    _s("laguna", num_attention_heads_per_layer=[4, 8], **_MIXED, **_MOE),
    _s("lfm2", "stateful", targets="q_proj k_proj v_proj out_proj in_proj w1 w2 w3",
        layer_types=["conv", "full_attention"]),
    _s("lfm2_moe", "stateful", targets="q_proj k_proj v_proj out_proj in_proj w1 w2 w3",
        layer_types=["conv", "full_attention"], num_dense_layers=1),
    _s("lfm3", "stateful", targets="q_proj k_proj v_proj o_proj w1 w2 w3",
        layer_types=["conv", "sliding_attention", "full_attention"], num_hidden_layers=3),
    _s("llama"),
    _s("llama/linear", **_rope("linear", factor=4.0)),
    _s("llama/dynamic", "length",
        note="its frequencies follow the longest length that it has seen, and stay",
        max_position_embeddings=16, **_rope("dynamic", factor=4.0)),
    _s("llama/yarn", **_rope("yarn", factor=4.0, original_max_position_embeddings=16)),
    _s("llama/llama3",
        **_rope("llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
            original_max_position_embeddings=32)),
    _s("llama/longrope", "length", note="frequencies change for the whole text at position 16",
        **_rope("longrope", short_factor=[1.0, 1.5, 2.0, 2.5], long_factor=[2.0, 3.0, 4.0, 5.0],
            factor=8.0, original_max_position_embeddings=16)),
    _s("llama4", text_config=_LLAMA4),
    _s("llama4_text", **_LLAMA4),
    _s("llama4_text/dense", interleave_moe_layer_step=2, **_LLAMA4),
    _s("longcat_flash", targets=_LATENT, num_key_value_heads=4, ffn_hidden_size=_INNER,
        expert_ffn_hidden_size=_NARROW, zero_expert_num=2),
    _s("mamba", "stateful", targets="in_proj x_proj dt_proj"),
    _s("mamba2", "stateful", targets="in_proj", num_heads=8, n_groups=2),
    _s("marian", "encoder-decoder", targets=_BART),
    _s("mbart", "encoder-decoder", targets=_BART),
    *_bert("megatron-bert"),
    _s("mellum", targets=_ATTENTION, **_MIXED, **_MOE),
    _s("mimo_v2_flash", head_dim=16, **_MIXED, **_MOE),
    _s("minicpm3", targets=_MLA, num_key_value_heads=4, scale_emb=2, dim_model_base=16),
    _s("minimax", "stateful", targets="q_proj k_proj v_proj o_proj qkv_proj out_proj output_gate"),
    _s("minimax_m2", targets=_ATTENTION),
    _s("minimax_m3_vl_text", "indexed", targets=_FUSED, index_n_heads=2, index_block_size=4,
        index_topk_blocks=2, layer_types=["full_attention", "minimax_m3_sparse"],
        dense_intermediate_size=_INNER, **_MOE),
    _s("ministral", **_MIXED),
    _s("ministral3",
        **_rope("yarn", factor=4.0, original_max_position_embeddings=16, llama_4_scaling_beta=0.3)),
    _s("mistral"),
    _s("mistral/full", sliding_window=None),
    _s("mixtral", targets=_ATTENTION),
    _s("mllama", note="saves its text config, which AutoModelForCausalLM does not know"),
    _s("modernbert-decoder", targets="q_proj k_proj v_proj Wi Wo", pad_token_id=0,
        local_attention=16, **_MIXED),
    _s("moshi", targets="linear fc1 fc2",
        note="its window is in its cache alone: cached steps differ from whole passes"),
    _s("moss_transcribe_diarize", "multimodal"),
    _s("mpt", targets="Wqkv out_proj up_proj down_proj"),
    _s("mpt/scaled", targets="Wqkv out_proj up_proj down_proj",
        attn_config={"clip_qkv": 1.0, "softmax_scale": 0.6, "alibi_bias_max": 4}),
    _s("mvp", "encoder-decoder", targets=_BART),
    _s("nanochat", targets="q_proj k_proj v_proj o_proj fc1 fc2"),
    _s("nemotron", targets=_UP_DOWN),
    _s("nemotron_h", "stateful", targets=_ATTENTION,
        note="its own cached steps differ from whole passes", num_hidden_layers=4,
        mamba_num_heads=8, mamba_head_dim=8, ssm_state_size=8, n_groups=2,
        moe_shared_expert_intermediate_size=_NARROW),
    _s("olmo", clip_qkv=1.0),
    _s("olmo2"),
    _s("olmo3", **_MIXED),
    _s("olmo_hybrid", "stateful", **_HYBRID),
    _s("olmoe", targets=_ATTENTION, clip_qkv=1.0),
    _s("openai-gpt", "no cache", targets=_GPT2),
    _s("opt", targets=_BART),
    _s("opt/post-norm", targets=_BART, do_layer_norm_before=False, word_embed_proj_dim=16),
    _s("pegasus", "encoder-decoder", targets=_BART),
    _s("persimmon", targets=_BLOOM),
    _s("phi", targets="q_proj k_proj v_proj dense fc1 fc2"),
    _s("phi/qk-norm", targets="q_proj k_proj v_proj dense fc1 fc2", qk_layernorm=True),
    _s("phi3", targets="qkv_proj o_proj gate_up_proj down_proj"),
    _s("phi3/longrope", "length", targets="qkv_proj o_proj gate_up_proj down_proj",
        note="frequencies change for the whole text at position 16",
        **_rope("longrope", short_factor=[1.0, 1.5, 2.0, 2.5], long_factor=[2.0, 3.0, 4.0, 5.0]),
        original_max_position_embeddings=16),
    _s("phi4_multimodal", "multimodal", targets="qkv_proj o_proj gate_up_proj down_proj",
        audio_config={"nemo_conv_channels": 8, "ext_pw_out_channel": _WIDTH}),
    _s("phimoe", targets=_ATTENTION),
    _s("plbart", "encoder-decoder", targets=_BART),
    _s("prophetnet", "encoder-decoder",
        targets="query_proj key_proj value_proj out_proj intermediate output",
        note="a cached step sees other positions than a whole pass", pad_token_id=0),
    _s("qwen2"),
    _s("qwen2/window", use_sliding_window=True, max_window_layers=1),
    _s("qwen2_moe"),
    _s("qwen3"),
    _s("qwen3_5", "stateful", text_config={**_HYBRID, **_PARTIAL}),
    _s("qwen3_5_moe", "stateful", text_config={**_HYBRID, **_PARTIAL}),
    _s("qwen3_5_moe_text", "stateful", **_HYBRID, **_PARTIAL),
    _s("qwen3_5_text", "stateful", **_HYBRID, **_PARTIAL),
    _s("qwen3_moe", targets=_ATTENTION),
    _s("qwen3_next", "stateful", targets=_ATTENTION, **_HYBRID, **_PARTIAL),
    _s("qwen4_exp", "stateful", text_config=_QWEN4),
    _s("qwen4_exp_text", "stateful", **_QWEN4),
    _s("recurrent_gemma", "stateful",
        targets="q_proj k_proj v_proj o_proj gate_proj up_proj down_proj linear_x",
        num_hidden_layers=3, attention_window_size=8, lru_width=_WIDTH, logits_soft_cap=3.0),
    _s("reformer", "chunked", targets="query key value query_key",
        note="needs a pad token where the length is no multiple of its chunks", is_decoder=True,
        attn_layers=["local", "lsh"], attention_head_size=8, axial_pos_shape=[8, 16],
        axial_pos_embds_dim=[16, 16], feed_forward_size=_INNER, local_attn_chunk_length=8,
        lsh_attn_chunk_length=8, num_buckets=4, hash_seed=0),
    *_bert("rembert", input_embedding_size=16, output_embedding_size=24),
    *_bert("roberta", pad_token_id=0),
    *_bert("roberta-prelayernorm", pad_token_id=0),
    *_bert("roc_bert", pronunciation_embed_dim=8, pronunciation_vocab_size=VOCABULARY,
        shape_embed_dim=8, shape_vocab_size=VOCABULARY),
    *_bert("roformer"),
    _s("rwkv", "stateful", targets="key value receptance output"),
    _s("seed_oss"),
    _s("smollm3", no_rope_layers=[1, 0]),
    _s("solar_open", targets=_ATTENTION),
    _s("stablelm", **_PARTIAL),
    _s("stablelm/parallel", use_parallel_residual=True, qk_layernorm=True, use_qkv_bias=True,
        **_PARTIAL),
    _s("starcoder2", targets="q_proj k_proj v_proj o_proj c_fc c_proj"),
    _s("starcoder2/full", targets="q_proj k_proj v_proj o_proj c_fc c_proj", sliding_window=None),
    _s("trocr", "encoder-decoder", targets=_BART),
    _s("vaultgemma", query_pre_attn_scalar=4, **_MIXED),
    _s("whisper", "encoder-decoder", targets=_BART),
    _s("xglm", targets=_BART,
        note="runs in float64 only under torch.set_default_dtype(torch.float64)", pad_token_id=0),
    _s("xlm", "bidirectional", targets="q_lin k_lin v_lin out_lin lin1 lin2",
        note="text attends both ways", pad_token_id=0),
    _s("xlm/causal", "no cache", targets="q_lin k_lin v_lin out_lin lin1 lin2", causal=True,
        pad_token_id=0),
    *_bert("xlm-roberta", pad_token_id=0),
    *_bert("xlm-roberta-xl", pad_token_id=0),
    _s("xlnet", "bidirectional", targets="layer_1 layer_2", note="text attends both ways"),
    _s("xlstm", "stateful", targets="q k v out_proj proj_up proj_down", hidden_size=128,
        embedding_dim=128),
    *_bert("xmod", pad_token_id=0, default_language="en_XX"),
    _s("youtu", targets=_MLA, num_key_value_heads=4),
    _s("zamba", "stateful", num_hidden_layers=3,
        layers_block_type=["linear_attention", "linear_attention", "hybrid"]),
    _s("zamba2", "stateful", targets=_FUSED, note="its own cached steps differ from whole passes",
        num_hidden_layers=3, use_mem_rope=True,
        layers_block_type=["linear_attention", "linear_attention", "hybrid"]),
    _s("zaya", "stateful", targets="q_proj k_proj o_proj down_proj out_proj",
        num_experts_per_tok=1, router_hidden_size=16, layer_types=["hybrid_sliding", "hybrid"]),
)
# fmt: on
ZOO = {specimen.name: specimen for specimen in _SPECIMENS}

# Types of the mapping that take no text, or not a text alone.
UNBUILT: dict[str, str] = {
    "gemma4_assistant": "a draft model: reads hidden states and keys of the model it assists",
    "gemma4_unified_assistant": "a draft model, like gemma4_assistant",
    "musicgen": "takes codebooks, and AutoModelForCausalLM cannot make it from its config",
    "musicgen_melody": "like musicgen",
    "gemma3n": "its vision tower needs the library timm",
}


def _values(config_class: Any, config: dict[str, Any]) -> dict[str, Any]:
    """Arguments of a configuration class: `_TINY` and `config`, its parts alike."""
    known = {f.name for f in dataclasses.fields(config_class)}
    values = {name: value for name, value in _TINY.items() if name in known} | config
    for name, part in config_class.sub_configs.items():
        if name in config and config[name] is None:
            continue
        inner = dict(config.get(name) or {})
        if part is AutoConfig:
            default = getattr(config_class, "sub_configs_defaults", {}).get(name)
            part = CONFIG_MAPPING[
                inner.setdefault("model_type", getattr(default, "model_type", ""))
            ]
        values[name] = _values(part, inner)
    return values


def configuration(specimen: Specimen) -> Any:
    """The specimen's configuration."""
    config_class = CONFIG_MAPPING[specimen.model_type]
    return config_class(**_values(config_class, specimen.config))


def build(name: str, seed: int = 0, **fields: Any) -> Any:
    """The model of an entry: float32, in eval mode, every term of it visible in its logits.

    Args:
        name: Of the entry.
        seed: Of the parameters.
        fields: Of its configuration, instead of the entry's own.
    """
    torch.manual_seed(seed)
    entry = ZOO[name]
    config = configuration(dataclasses.replace(entry, config=fields) if fields else entry)
    model_class = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    model = AutoModelForCausalLM.from_config(
        config,
        # Eager, but for classes with attention of their own, whose eager form may be another model.
        attn_implementation="eager" if model_class._supports_attention_backend else None,
        experts_implementation="eager",
    )
    _randomise(model, torch.Generator().manual_seed(seed))
    return model.float().eval()


@torch.no_grad()
def _randomise(model: nn.Module, generator: torch.Generator) -> None:
    """Draw every matrix anew and shift every vector: no scale is 1, no bias and no sink 0."""
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if parameter.dim() < 2 or name.endswith(("bias", "A_log")):
            parameter.add_(0.3 * noise)
        elif parameter.requires_grad:  # sinusoids are not drawn: checkpoints lack them
            parameter.copy_(noise * (1.5 / math.sqrt(min(parameter.shape[-1], _WIDTH))))
    for name, buffer in model.named_buffers():
        if name.endswith(("_bias", "_biases", "layer_scalar")):  # of routers and of Gemma 4
            buffer.add_(0.3 * torch.randn(buffer.shape, generator=generator))

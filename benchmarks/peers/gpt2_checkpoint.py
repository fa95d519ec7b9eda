"""A transformers GPT-2 checkpoint and a plain PEFT adapter of it, as converters read them.

Needs the standard library, numpy and safetensors. What a converter would get wrong is refused.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import load_file

Array = NDArray[Any]

# What an adapter_config.json must say for alpha / rank to be the whole of its scaling, and for
# A and B to be the whole of its delta.
PLAIN: dict[str, tuple[object, ...]] = {
    "peft_type": ("LORA",),
    "bias": ("none", None),
    "use_rslora": (False, None),
    "use_dora": (False, None),
    "fan_in_fan_out": (True, False, None),
    "alpha_pattern": ({}, None),
    "rank_pattern": ({}, None),
    "modules_to_save": (None, []),
}


def read_config(folder: Path) -> dict[str, Any]:
    """Return the configuration of a checkpoint; `n_inner` has its value even where it is implied.

    Raises:
        ValueError: No GPT-2 of the usual kind.
    """
    config: dict[str, Any] = json.loads((folder / "config.json").read_text())
    if config["model_type"] != "gpt2" or config.get("activation_function") != "gelu_new":
        raise ValueError("only GPT-2 with gelu_new can be converted")
    if config.get("scale_attn_by_inverse_layer_idx") or not config.get("scale_attn_weights", True):
        raise ValueError("only GPT-2 with the usual scaling of attention can be converted")
    config["n_inner"] = config.get("n_inner") or 4 * config["n_embd"]
    return config


def read_tensors(folder: Path, config: dict[str, Any]) -> Iterator[tuple[str, Array]]:
    """Yield the tensors of a checkpoint in float32, matrices as (out, in).

    Names are those of transformers without `transformer.`. A head that is tied is left out, and so
    are the causal masks that old checkpoints hold.
    """
    for file in sorted(folder.glob("*.safetensors")):
        for name, tensor in sorted(load_file(file).items()):
            name = name.removeprefix("transformer.")
            if name == "lm_head.weight" and config.get("tie_word_embeddings", True):
                continue
            if re.fullmatch(r"h\.\d+\.attn\.(masked_)?bias", name):
                continue
            # Conv1D stores (in, out), all others (out, in).
            if name.endswith(".weight") and ".c_" in name:
                tensor = tensor.T
            yield name, np.ascontiguousarray(tensor, dtype=np.float32)


def read_adapter_config(folder: Path) -> dict[str, Any]:
    """Return the configuration of an adapter whose deltas are all lora_alpha / r times B A.

    Raises:
        ValueError: Another kind of adapter.
    """
    config: dict[str, Any] = json.loads((folder / "adapter_config.json").read_text())
    for key, allowed in PLAIN.items():
        if config.get(key) not in allowed:
            raise ValueError(f"an adapter with {key}={config[key]!r} cannot be converted")
    return config

"""Adapters of a base with one tiny module, as the two files that a store keeps."""

from __future__ import annotations

import json

import torch
from safetensors.torch import save

from superpose_adapters.layout import ModuleLayout
from superpose_adapters.peft.folder import parse_adapter

LAYOUT = {"m": ModuleLayout(3, 2, transposed=False)}


def files(seed: int) -> tuple[bytes, bytes]:
    """Return config and tensors; each seed is another adapter."""
    config = {"peft_type": "LORA", "r": 1, "lora_alpha": 1, "target_modules": ["m"]}
    tensors = {
        "base_model.model.m.lora_A.weight": torch.full((1, 3), seed + 1.0),
        "base_model.model.m.lora_B.weight": torch.ones(2, 1),
    }
    return json.dumps(config).encode(), save(tensors)


# By seed, as the loader says, which knows nothing of stores.
DIGESTS = [parse_adapter(*files(seed), LAYOUT).digest for seed in range(4)]

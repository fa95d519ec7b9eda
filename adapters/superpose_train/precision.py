"""What the frozen base computes in while an adapter is trained; losses are measured in float32."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch

from superpose_adapters.fast_bfloat16 import has_fast_bfloat16

Decided = Literal["float32", "bfloat16"]
Precision = Literal["auto", "float32", "bfloat16"]


def decide(precision: Precision, device: str) -> Decided:
    """Return what `auto` stands for on a device: bfloat16 where it is fast, else float32."""
    if precision == "auto":
        return "bfloat16" if has_fast_bfloat16(device) else "float32"
    return precision


def autocast(precision: Decided, device: str) -> torch.autocast:
    """Return the context of a training step; the parameters stay in float32 either way."""
    return torch.autocast(device, torch.bfloat16, enabled=precision == "bfloat16")


def trained_precision(record: Mapping[str, Any]) -> Decided:
    """Return what a training.json says that its run computed in.

    Records from before --precision say it by `bf16_autocast`.
    """
    decided: Decided | None = record["parameters"].get("precision")
    return decided or ("bfloat16" if record["bf16_autocast"] else "float32")

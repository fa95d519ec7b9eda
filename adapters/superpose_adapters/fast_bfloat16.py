"""Where bfloat16 is faster than float32: one answer for the server and the trainer."""

from __future__ import annotations

from typing import Any

import torch


def has_fast_bfloat16(device: str) -> bool:
    """Return whether bf16 pays: a GPU from Ampere on, or a CPU with AVX512-BF16 or AMX.

    Any CPU computes bf16, most of them slower than float32.

    Args:
        device: cpu or cuda.
    """
    if device == "cuda":
        return torch.cuda.get_device_capability()[0] >= 8
    read = getattr(torch.cpu, "get_capabilities", dict)
    capabilities: dict[str, Any] = read()
    return any(capabilities.get(name) is True for name in ("avx512_bf16", "amx_bf16"))

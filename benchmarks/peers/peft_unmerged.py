"""Peer: a PEFT model whose adapter is not merged, driven by `generate` of transformers."""

from __future__ import annotations

import peft
import transformers

from benchmarks.peers.peer import Settings
from benchmarks.peers.transformers_generate import Generate, load_model


def load(settings: Settings) -> Generate:
    if settings.adapter is None:
        raise ValueError("this peer needs an adapter")
    model = peft.PeftModel.from_pretrained(load_model(settings), str(settings.adapter)).eval()
    version = f"peft {peft.__version__}, transformers {transformers.__version__}"
    return Generate(model, settings, version)

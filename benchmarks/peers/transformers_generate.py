"""Peer: `model.generate` of transformers, with its default key-value cache."""

from __future__ import annotations

from time import perf_counter
from typing import Any

import torch
import transformers
from transformers.generation.streamers import BaseStreamer

from benchmarks.peers.peer import Answer, Prompts, Settings


class FirstToken(BaseStreamer):  # type: ignore[misc]
    """Notes when the first tokens of the batch are there."""

    def __init__(self) -> None:
        self.puts = 0
        self.at = 0.0

    def put(self, value: Any) -> None:
        # The first call hands over the prompts, the second the first new tokens.
        self.puts += 1
        if self.puts == 2:
            self.at = perf_counter()

    def end(self) -> None:
        pass


def load_model(settings: Settings) -> Any:
    """Return the model, ready to generate greedily and to run past its end-of-text token."""
    torch.set_num_threads(settings.threads)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        settings.model, dtype=getattr(torch, settings.dtype)
    )
    model.generation_config = transformers.GenerationConfig(do_sample=False, pad_token_id=0)
    return model.to(settings.device).eval()


class Generate:
    """`generate` of a transformers model, or of a PEFT model around one."""

    def __init__(self, model: Any, settings: Settings, version: str) -> None:
        self.model = model
        self.device = settings.device
        self.version = version
        self.weights_bits = 8 * getattr(torch, settings.dtype).itemsize

    def generate(self, prompts: Prompts, new_tokens: int) -> Answer:
        started = perf_counter()
        width = max(map(len, prompts))
        # Padding goes to the left, as transformers wants it of decoders.
        ids = torch.tensor([[0] * (width - len(row)) + row for row in prompts], device=self.device)
        mask = torch.tensor(
            [[0] * (width - len(row)) + [1] * len(row) for row in prompts], device=self.device
        )
        first = FirstToken()
        with torch.inference_mode():
            output = self.model.generate(
                input_ids=ids, attention_mask=mask, max_new_tokens=new_tokens, streamer=first
            )
        tokens: list[list[int]] = output[:, width:].tolist()
        return Answer(tokens, first.at - started, perf_counter() - started)


def load(settings: Settings) -> Generate:
    if settings.adapter is not None:
        raise ValueError("this peer runs the base model only")
    return Generate(load_model(settings), settings, f"transformers {transformers.__version__}")

"""The server's own step loop without adapters: what merged serving is compared with.

It runs like a peer, in a process of its own, because torch keeps workers for every thread that
computes: with two engines in a process there are more workers than cores, and then OpenMP puts them
to sleep between products, which takes milliseconds off both.
"""

from __future__ import annotations

import time
from typing import Literal

import torch

from benchmarks.inprocess import Local
from benchmarks.options import Options
from benchmarks.peers.peer import Answer, Prompts, Settings


class Bare:
    """An engine that has no adapter and cannot correct."""

    def __init__(self, settings: Settings, compile: Literal["auto", "off"]) -> None:
        torch.set_num_threads(settings.threads)
        self.version = f"torch {torch.__version__}"
        self.weights_bits = 8 * getattr(torch, settings.dtype).itemsize
        options = Options(
            model=str(settings.model),
            dtype=settings.dtype,
            device=settings.device,
            compile=compile,
            seconds=0,
            json=False,
            out=settings.cache,
            cache=settings.cache,
            label="bare",
        )
        self.local = Local(
            options, settings.model, None, max_batch=settings.rows, max_length=settings.length
        )
        corrections = self.local.runtime.local.runner._corrections
        corrections.count = lambda rows, resident: 0  # type: ignore[method-assign]
        corrections.plan = lambda rows, resident: None  # type: ignore[method-assign]
        corrections.forget = lambda in_use=(): None  # type: ignore[method-assign]

    def generate(self, prompts: Prompts, new_tokens: int) -> Answer:
        base = self.local.bind({})
        began = time.perf_counter()
        requests = self.local.generate(prompts, [base] * len(prompts), new_tokens)
        return Answer(
            tokens=[request.tokens for request in requests],
            first_token_seconds=max(request.arrivals[0][0] for request in requests) - began,
            seconds=max(request.ended for request in requests) - began,
        )


def load(settings: Settings) -> Bare:
    """Load the engine as it is served: compiled, with the project's kernels."""
    return Bare(settings, "auto")

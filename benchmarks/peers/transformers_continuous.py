"""Peer: continuous batching of transformers, `model.generate_batch`."""

from __future__ import annotations

import logging
from time import perf_counter
from typing import Any

import torch
import transformers
from transformers.generation.configuration_utils import ContinuousBatchingConfig

from benchmarks.peers.peer import Answer, Prompts, Settings
from benchmarks.peers.transformers_generate import load_model

PAGE = 32  # tokens
# Most tokens of one forward pass: as many as the prompts of 32 rows in our runs need, and few
# enough that the mask, tokens x cache, stays small.
PASS = 1024


class GenerateBatch:
    """`generate_batch` with one cache, sized for the largest batch and kept between requests."""

    def __init__(self, model: Any, settings: Settings) -> None:
        self.model = model
        self.version = f"transformers {transformers.__version__}"
        self.weights_bits = 8 * getattr(torch, settings.dtype).itemsize
        pages = -(-settings.length // PAGE)
        self.batching = ContinuousBatchingConfig(
            page_size=PAGE,
            num_blocks=settings.rows * (pages + 1),
            max_batch_tokens=PASS,
            max_requests_per_batch=settings.rows,
            # The runs repeat their prompts: a prefix cache would skip work that the others do.
            allow_block_sharing=False,
        )

    def generate(self, prompts: Prompts, new_tokens: int) -> Answer:
        started = perf_counter()
        outputs = self.model.generate_batch(
            prompts,
            generation_config=self.model.generation_config,
            continuous_batching_config=self.batching,
            record_timestamps=True,
            persistent_manager=True,
            max_new_tokens=new_tokens,
        )
        results = list(outputs.values())
        if len(results) != len(prompts) or any(result.error for result in results):
            raise RuntimeError("generate_batch did not finish every row")
        # The clock stops at the last token: what follows is the manager's thread being stopped.
        return Answer(
            [result.generated_tokens for result in results],
            max(result.timestamps[0] for result in results) - started,
            max(result.timestamps[-1] for result in results) - started,
        )


def load(settings: Settings) -> GenerateBatch:
    if settings.adapter is not None:
        raise ValueError("this peer runs the base model only")
    model = load_model(settings)
    model.generation_config.eos_token_id = -1  # none
    # It warns at every request that the kept cache has a fixed size, which is what is wanted here.
    logging.getLogger("ContinuousBatchingLogger").setLevel(logging.ERROR)
    return GenerateBatch(model, settings)

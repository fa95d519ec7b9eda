"""The base model: a transformers decoder, loaded once, run on token ids with explicit positions."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from superpose_adapters.digest import checkpoint_digest
from superpose_adapters.layout import Layout, read_layout
from superpose_server.cache import SlotCache, Window


class Model:
    """A decoder with a slot cache.

    Attributes:
        module: The transformers model, in eval mode, on `device` in `dtype`.
        layout: Its adaptable modules.
        base_digest: sha256 of the checkpoint, the same for every dtype and device.
        context_length: Tokens of prompt and answer together.
    """

    def __init__(
        self,
        folder: Path,
        *,
        dtype: torch.dtype,
        device: torch.device,
        max_batch: int,
        max_length: int | None = None,
    ) -> None:
        """Load the checkpoint in `folder` and allocate the cache.

        Raises:
            ValueError: The folder is no such checkpoint, or `max_length` is more than it can do.
        """
        self.base_digest = checkpoint_digest(folder)
        try:
            self.module: nn.Module = AutoModelForCausalLM.from_pretrained(
                folder, dtype=dtype, attn_implementation="sdpa", use_safetensors=True
            )
        except (OSError, json.JSONDecodeError, KeyError) as error:
            raise ValueError(f"base {folder} cannot be loaded: {error}") from error
        self.module.to(device).eval().requires_grad_(False)
        _own_storage(self.module)
        self.dtype = dtype
        self.device = device
        self.config: Any = self.module.config
        self.vocabulary: int = self.config.vocab_size
        positions = int(self.config.max_position_embeddings)
        if max_length is not None and not 2 <= max_length <= positions:
            raise ValueError(f"max_length is {max_length}: this base takes 2 to {positions}")
        self.context_length = max_length or positions
        window = getattr(self.config, "sliding_window", None)
        if window and window < self.context_length:
            raise ValueError(
                f"base {folder} attends to {window} tokens only: set --max-length {window}"
            )
        self.layout: Layout = read_layout(self.module)
        self.cache = SlotCache(max_batch, self.context_length)
        # The first pass allocates the cache, so that memory is known before any request.
        self.prefill(0, [0])

    @torch.inference_mode()
    def prefill(self, slot: int, prompt: Sequence[int]) -> Tensor:
        """Run a prompt into `slot`; return the logits after it, float32 (1, vocabulary)."""
        ids = torch.tensor([list(prompt)], device=self.device)
        positions = torch.arange(ids.shape[1], device=self.device)[None]
        return self._run(ids, Window(slot, positions, ids.shape[1]))

    @torch.inference_mode()
    def decode(self, tokens: Sequence[int], positions: Sequence[int]) -> Tensor:
        """Run one token for each of slots 0..n-1; return float32 logits (n, vocabulary)."""
        ids = torch.tensor(tokens, device=self.device)[:, None]
        at = torch.tensor(positions, device=self.device)[:, None]
        return self._run(ids, Window(0, at, max(positions) + 1))

    def _run(self, ids: Tensor, window: Window) -> Tensor:
        self.cache.select(window)
        readable = torch.arange(window.length, device=self.device)
        mask = readable[None, None, :] <= window.positions[:, :, None]  # (rows, tokens, length)
        logits: Tensor = self.module(
            input_ids=ids,
            position_ids=window.positions,
            attention_mask=mask[:, None],
            past_key_values=self.cache,
            use_cache=False,
            logits_to_keep=1,
        ).logits
        return logits[:, -1].float()

    @torch.inference_mode()
    def logits(self, ids: Tensor) -> Tensor:
        """Return float32 logits (rows, tokens, vocabulary) of right-padded ids, without the cache.

        Positions after the end of a row are computed too and mean nothing.
        """
        tokens = ids.shape[1]
        positions = torch.arange(tokens, device=self.device)
        mask = (positions[None, :] <= positions[:, None]).expand(ids.shape[0], 1, tokens, tokens)
        logits: Tensor = self.module(
            input_ids=ids,
            position_ids=positions[None].expand_as(ids),
            attention_mask=mask,
            use_cache=False,
        ).logits
        return logits.float()


@torch.no_grad()
def _own_storage(module: nn.Module) -> None:
    """Move every parameter out of the mapped checkpoint file into storage that torch allocated.

    A mapped file may change or shrink while it is served. And its tensors are aligned to 8 bytes
    only, where the bits of a matrix product depend on the alignment of its output: the same mix
    would not give the same bits in the live weights and in a fresh fold.
    """
    for parameter in module.parameters():
        parameter.data = parameter.data.clone(memory_format=torch.contiguous_format)

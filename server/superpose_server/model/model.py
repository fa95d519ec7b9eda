"""The base model: a transformers decoder, loaded once, run on batches of tokens."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from superpose_adapters.digest import checkpoint_digest
from superpose_adapters.layout import Layout, read_layout
from superpose_server.model import attention
from superpose_server.model.activation import replace_activations
from superpose_server.model.batch import Batch, Span
from superpose_server.model.cache import SlotCache
from superpose_server.model.kernels.build import CompilerError, load_kernels
from superpose_server.model.memory import MIB, free_bytes, lasting_copy
from superpose_server.model.packed import pack_modules

# What the CPU kernels store; float16 has no fast conversion on most processors.
_KERNEL_DTYPES = (torch.float32, torch.bfloat16)
_WARM_UP_TOKENS = 5
# Of what is free on a GPU; the rest is for captured steps, their factors, and the scratch of passes
# and folds.
_CACHE_SHARE = 0.9


class Model:
    """A decoder with a slot cache.

    Attributes:
        module: The transformers model, in eval mode, on `device` in `dtype`.
        layout: Its adaptable modules.
        base_digest: sha256 of the checkpoint, the same for every dtype and device.
        context_length: Tokens of prompt and answer together.
        max_batch: Rows that run at once.
        scratch_slot: A slot that no row runs in, for texts that are only scored.
        packed: True if the CPU kernels run it, on packed parameters.
        terms: What corrects the next pass on packed parameters; see `pack_modules`.
        capturable: True if its decode steps should be captured (`graphs.py`).
    """

    def __init__(
        self,
        folder: Path,
        *,
        dtype: torch.dtype,
        device: torch.device,
        max_batch: int,
        max_length: int | None = None,
        cache_bytes: int | None = None,
        kernels: bool = False,
        graphs: bool = True,
    ) -> None:
        """Load the checkpoint in `folder` and allocate the cache.

        Args:
            folder: A transformers checkpoint in safetensors.
            dtype: Of parameters and cache.
            device: Where it runs.
            max_batch: Rows that run at once.
            max_length: Tokens a row; None: all positions of the base.
            cache_bytes: Room for keys and values; None: what `max_batch` rows take.
            kernels: Use the CPU kernels where they apply, which is float32 and bfloat16 on a CPU,
                and captured decode steps on a GPU.
            graphs: With kernels, also compile or capture the passes, which takes its time.

        Raises:
            ValueError: The folder is no such checkpoint, `max_length` is more than it can do, the
                cache does not fit, or the kernels cannot be compiled.
        """
        self.base_digest = checkpoint_digest(folder)
        self.packed = kernels and device.type == "cpu" and dtype in _KERNEL_DTYPES
        if self.packed:
            try:
                load_kernels()
            except CompilerError as error:
                raise ValueError(str(error)) from error
        try:
            self.module: nn.Module = AutoModelForCausalLM.from_pretrained(
                folder,
                dtype=dtype,
                attn_implementation=attention.KERNEL if self.packed else attention.TORCH,
                use_safetensors=True,
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
        self.terms: Tensor | None = None
        if self.packed:
            self.terms = pack_modules(self.module, self.layout)
            replace_activations(self.module)
        self._forward: Callable[[Batch, Tensor], Tensor] = self._pass
        self.capturable = kernels and graphs and device.type == "cuda"
        # The first pass tells what a token takes, whatever the architecture.
        self.scratch_slot = 0
        self.cache = SlotCache(1, 1)
        self._warm_up()
        self.max_batch = self._rows_that_fit(self.cache.nbytes, max_batch, cache_bytes)
        self.scratch_slot = self.max_batch
        self.cache = SlotCache(self.max_batch + 1, self.context_length)
        # The next one allocates the cache, so that memory is known before any request.
        self._warm_up()
        if self.packed and graphs:
            self._compile()

    def _warm_up(self) -> None:
        with torch.inference_mode():
            batch = Batch.of([Span(self.scratch_slot, (0,), 0)], self.device)
            self.run(batch, batch.rows)

    def _compile(self) -> None:
        """Compile the forward pass, once for any number of tokens.

        Parameters and corrections are read when it runs, not when it is compiled: nothing is
        frozen into it, and folds write under it.
        """
        self._forward = torch.compile(
            self._pass,
            options={
                # The shapes that the kernels check need no second check at every call.
                "size_asserts": False,
                # Nor do the modules: they are ours, made once, and only their values change.
                "guard_filter_fn": torch.compiler.skip_guard_on_all_nn_modules_unsafe,
            },
        )
        # Made like those of any pass: a graph tells inference tensors from others.
        with torch.inference_mode():
            batch = Batch.of([Span(self.scratch_slot, (0,) * _WARM_UP_TOKENS, 0)], self.device)
            # Fewer logits than tokens, or the two numbers would be taken for one.
            keep = torch.arange(_WARM_UP_TOKENS - 1)
            for column in (batch.ids, batch.slots, batch.written, batch.starts, keep):
                torch._dynamo.mark_dynamic(column, 0)
            self.run(batch, keep)

    def _rows_that_fit(self, token_bytes: int, max_batch: int, cache_bytes: int | None) -> int:
        """Return how many rows the cache gets, besides its scratch slot."""
        slot = token_bytes * self.context_length
        rows = max_batch
        if cache_bytes is not None:
            rows = min(max_batch, cache_bytes // slot - 1)
            if rows < 1:
                raise ValueError(
                    f"--cache-mib {cache_bytes / MIB:.0f} holds no row of {self.context_length} "
                    f"tokens: give it {2 * slot / MIB:.0f} or more, or lower --max-length"
                )
        needed, free = slot * (rows + 1), free_bytes(self.device)
        if self.device.type == "cuda":
            free = int(free * _CACHE_SHARE)
        if needed > free:
            raise ValueError(
                f"the cache of {rows} rows of {self.context_length} tokens needs "
                f"{needed / MIB:.0f} MiB and {free / MIB:.0f} MiB are free: lower --max-batch or "
                "--max-length, or set --cache-mib"
            )
        return rows

    def run(self, batch: Batch, keep: Tensor) -> Tensor:
        """Run tokens in one pass, write their keys and values, and return some logits.

        Under `torch.inference_mode`, as the compiled graph was made.

        Args:
            batch: Tokens whose rows' earlier tokens the cache holds. With packed parameters at
                least two of them, as of `keep`: one compiled graph serves all sizes but 1.
            keep: Indices of tokens, int64, on the device.

        Returns:
            float32 (len(keep), vocabulary).
        """
        self.cache.select(batch)
        return self._forward(batch, keep)

    def _pass(self, batch: Batch, keep: Tensor) -> Tensor:
        logits: Tensor = self.module(
            input_ids=batch.ids[None],
            position_ids=batch.positions[None],
            past_key_values=self.cache,
            use_cache=False,
            logits_to_keep=keep,
            batch=batch,
        ).logits
        return logits[0].float()


@torch.no_grad()
def _own_storage(module: nn.Module) -> None:
    """Move every parameter out of the mapped checkpoint file into storage of its own.

    A mapped file may change or shrink while it is served. And its tensors are aligned to 8 bytes
    only, where the bits of a matrix product depend on the alignment of its output: the same mix
    would not give the same bits in the live weights and in a fresh fold.
    """
    for parameter in module.parameters():
        parameter.data = lasting_copy(parameter.data)

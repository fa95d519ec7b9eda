"""The base model: a transformers decoder on one device, run on batches of tokens."""

from __future__ import annotations

import inspect
import logging
import os
import shlex
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._dynamo.exc import FailOnRecompileLimitHit, TorchDynamoException

from superpose_adapters.layout import read_layout
from superpose_adapters.one_line import one_line
from superpose_server.model import attention
from superpose_server.model.activation import replace_activations
from superpose_server.model.batch import Batch, Span
from superpose_server.model.cache import SlotCache, TokenStore
from superpose_server.model.capacity import ANY_POSITIONS, CACHE_SHARE, find_capacity, positions_of
from superpose_server.model.kernels.build import load_kernels
from superpose_server.model.memory import free_bytes, is_out_of_memory, own_storage
from superpose_server.model.packed import pack_modules
from superpose_server.model.passes import Way, row_pass, shared_pass, whole_pass
from superpose_server.model.rope import fix_frequencies
from superpose_server.model.survey import SURVEYED, OwnMask, survey_attention, survey_rows

# What the CPU kernels store; float16 has no fast conversion on most processors.
KERNEL_DTYPES = (torch.float32, torch.bfloat16)
_WARM_UP_TOKENS = 5

_log = logging.getLogger(__name__)


class Model:
    """A decoder with what its rows keep between passes.

    Attributes:
        module: The transformers model, in eval mode, on `device` in `dtype`.
        way: How its rows run.
        layout: Its adaptable modules.
        heads: Those of them that see only the tokens whose logits are wanted.
        base_digest: sha256 of the checkpoint, the same for every dtype and device.
        context_length: Tokens of prompt and answer together.
        switch: Rows that become longer than this are run anew; None: none are (`rope.py`).
        max_batch: Rows that run at once.
        scratch_slot: A slot that no row runs in, for texts that are only scored.
        packed: True if the CPU kernels run it, on packed parameters.
        terms: What corrects the next pass on packed parameters; see `pack_modules`.
        capturable: True if its decode steps should be captured (`graphs.py`).
    """

    cache: SlotCache | TokenStore

    def __init__(
        self,
        module: Any,
        *,
        base_digest: str,
        device: torch.device,
        max_batch: int,
        max_length: int | None = None,
        cache_bytes: int | None = None,
        kernels: bool = False,
        graphs: bool = True,
    ) -> None:
        """Take over `module` and allocate the cache.

        Args:
            module: What `load_checkpoint` returns, on `device`.
            base_digest: sha256 of its checkpoint.
            device: Where it runs.
            max_batch: Rows that run at once.
            max_length: Tokens a row; None: all positions of the base, or as many as a default
                limit on the cache allows.
            cache_bytes: Room for what rows keep; None: what `max_batch` rows take.
            kernels: Use the CPU kernels where they apply, which is float32 and bfloat16 on a CPU,
                and captured decode steps on a GPU.
            graphs: With kernels, also compile or capture the passes, which takes its time.

        Raises:
            ValueError: `max_length` is more than it can do, the cache does not fit, the kernels
                cannot be compiled, or the model cannot be run at all.
        """
        self.base_digest = base_digest
        self.device = device
        self.module = module
        if device.type == "cpu":
            own_storage(module)
        self.dtype: torch.dtype = next(module.parameters()).dtype
        config = self.module.config.get_text_config(decoder=True)
        positions = positions_of(config)
        if max_length is not None and not 2 <= max_length <= (positions or max_length):
            raise ValueError(f"max_length is {max_length}: this base takes 2 to {positions}")
        self.context_length = max_length or positions or ANY_POSITIONS
        self.switch = fix_frequencies(self.module)
        self.packed = kernels and device.type == "cpu" and self.dtype in KERNEL_DTYPES
        self.way = self._find_way()
        self.packed &= self.way is Way.SHARED
        if self.packed:
            load_kernels()
        self.scratch_slot = 0
        self._forward: Callable[[Batch, Tensor], Tensor] = self._pass
        self.cache = self._make_cache(*SURVEYED)
        self.layout, self.heads = survey_rows(
            self.module,
            read_layout(self.module),
            self.run,
            device,
            alone=self.way is not Way.SHARED,
        )
        self.terms: Tensor | None = None
        if self.packed:
            self.terms = pack_modules(self.module, self.layout)
            replace_activations(self.module)
        # A captured step has no choice of frequencies.
        self.capturable = (
            kernels
            and graphs
            and device.type == "cuda"
            and self.way is Way.SHARED
            and self.switch is None
        )
        # The first pass tells what a token takes, whatever the architecture.
        self.cache = self._make_cache(1, 1)
        self._warm_up()
        capacity = find_capacity(
            token_bytes=self.cache.nbytes,
            positions=self.context_length,
            max_batch=max_batch,
            max_length=max_length,
            cache_bytes=cache_bytes,
            free=free_bytes(device),
            share=CACHE_SHARE[device.type],
        )
        self.max_batch, self.context_length = capacity.rows, capacity.length
        self.scratch_slot = self.max_batch
        self.cache = self._make_cache(self.max_batch + 1, self.context_length)
        # The next one allocates the cache, so that memory is known before any request.
        self._warm_up()
        if self.packed and graphs:
            self._compile()

    def _find_way(self) -> Way:
        """Find the fastest way to run rows that this base allows, and set its attention to it."""
        try:
            windows = survey_attention(self.module, self.context_length, self.device)
        except OwnMask as reason:
            raise ValueError(f"it {reason}") from reason
        except Exception as reason:  # Whatever its code says to what it is shown here.
            if is_out_of_memory(reason):
                raise
            attention.use_own_attention(self.module)
            way = Way.ROWS if self._keeps_keys() else Way.WHOLE
            _log.warning("rows run alone, which is slower: %s; %s", way.value, one_line(reason))
            return way
        for module, window in windows.items():
            module.superpose_window = window  # type: ignore[assignment]
        self.module.set_attn_implementation(attention.KERNEL if self.packed else attention.TORCH)
        return Way.SHARED

    def _keeps_keys(self) -> bool:
        """Return whether a pass of one row writes keys and values."""
        if "past_key_values" not in inspect.signature(self.module.forward).parameters:
            return False
        cache = SlotCache(1, 1)
        batch = Batch.of([Span(0, (0,), 0)], self.device)
        with torch.inference_mode():
            row_pass(self.module, cache, batch, batch.rows)
        return cache.layers > 0

    def _make_cache(self, slots: int, length: int) -> SlotCache | TokenStore:
        return TokenStore(slots, length) if self.way is Way.WHOLE else SlotCache(slots, length)

    def _warm_up(self) -> None:
        with torch.inference_mode():
            batch = self.batch([Span(self.scratch_slot, (0,), 0)])
            self.run(batch, batch.rows)

    def _compile(self) -> None:
        """Compile the forward pass, once for any number of tokens.

        Parameters and corrections are read when it runs, not when it is compiled: nothing is
        frozen into it, and folds write under it.

        Raises:
            ValueError: It cannot be compiled whole. A part of a pass must not be: its graph would
                serve every layer, since modules are not told apart.
        """
        if len(shlex.split(os.environ.get("CXX", ""))) > 1:
            raise ValueError(
                f"CXX is {os.environ['CXX']!r}, and torch takes a compiler without arguments: set "
                "CXX to one, or pass --compile off"
            )
        self._forward = torch.compile(
            self._pass,
            fullgraph=True,
            options={
                # The shapes that the kernels check need no second check at every call.
                "size_asserts": False,
                # Nor do the modules: they are ours, made once, and only their values change.
                "guard_filter_fn": torch.compiler.skip_guard_on_all_nn_modules_unsafe,
            },
        )
        # Made like those of any pass: a graph tells inference tensors from others.
        with torch.inference_mode():
            batch = self.batch([Span(self.scratch_slot, (0,) * _WARM_UP_TOKENS, 0)])
            # Fewer logits than tokens, or the two numbers would be taken for one.
            keep = torch.arange(_WARM_UP_TOKENS - 1)
            for column in (*batch.columns, keep):
                torch._dynamo.mark_dynamic(column, 0)
            try:
                self.run(batch, keep)
            except (TorchDynamoException, FailOnRecompileLimitHit) as e:
                raise ValueError(
                    f"this base cannot be compiled as a whole: pass --compile off ({one_line(e)})"
                ) from e

    def batch(self, spans: Sequence[Span]) -> Batch:
        """Lay `spans` end to end, as `run` takes them."""
        return Batch.of(spans, self.device, self.switch)

    def run(self, batch: Batch, keep: Tensor) -> Tensor:
        """Run tokens in one pass, write their keys and values, and return some logits.

        Under `torch.inference_mode`, as the compiled graph was made.

        Args:
            batch: Tokens whose rows' earlier tokens the cache holds. With packed parameters at
                least two of them, as of `keep`: one compiled graph serves all sizes but 1. Of one
                row, unless the model's `way` is SHARED; a whole one, if it is WHOLE.
            keep: Indices of tokens, int64, on the device.

        Returns:
            float32 (len(keep), vocabulary).
        """
        if isinstance(self.cache, SlotCache):
            self.cache.select(batch)
        return self._forward(batch, keep)

    def _pass(self, batch: Batch, keep: Tensor) -> Tensor:
        return _RUN[self.way](self.module, self.cache, batch, keep)


_RUN = {Way.SHARED: shared_pass, Way.ROWS: row_pass, Way.WHOLE: whole_pass}

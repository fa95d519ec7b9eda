"""The key-value cache: one slot a running row, filled by position.

It is what a transformers model calls `past_key_values`. A pass of many rows uses `update` alone,
since mask and positions are the batch's, and reads all slots (`attention.py`). A pass of one row
sees `RowCache`, transformers' own idea of a cache. A base without any cache gets a `TokenStore`.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor

from superpose_server.model.batch import Batch, Span
from superpose_server.model.memory import lasting_zeros

# Larger than keys and values are.
_SPOILT = 16.0


class Slots(Protocol):
    """What running rows leave behind for their next pass, in slots."""

    @property
    def nbytes(self) -> int:
        """Bytes allocated."""
        ...

    def distrust(self, slot: int) -> None:
        """Note that a slot may hold what is not finite; it is cleared before anybody reads it."""
        ...

    def claim(self, slot: int) -> None:
        """Make a slot fit for a row that begins or is moved there."""
        ...

    def spoil(self, slot: int) -> None:
        """Fill a slot with what shows in a row that reads it before it is written."""
        ...

    def move(self, source: int, target: int, length: int) -> None:
        """Copy the first `length` positions of slot `source` to slot `target`, which is claimed."""
        ...


class SlotCache:
    """Keys and values of all slots, per layer (slots, heads, max_length, head_dim).

    Layers are allocated by the first pass through the model, whose shapes are then those that the
    model really uses, whatever its architecture.
    """

    def __init__(self, slots: int, max_length: int) -> None:
        """Make an empty cache for `slots` rows of `max_length` tokens."""
        self.slots = slots
        self.max_length = max_length
        self._keys: list[Tensor] = []
        self._values: list[Tensor] = []
        self._batch: Batch | None = None
        self._distrusted: set[int] = set()

    @property
    def nbytes(self) -> int:
        """Bytes allocated."""
        return sum(t.numel() * t.element_size() for t in (*self._keys, *self._values))

    @property
    def layers(self) -> int:
        """Layers that have written anything yet."""
        return len(self._keys)

    def select(self, batch: Batch) -> None:
        """Choose where the next forward pass writes."""
        self._batch = batch

    def update(
        self, keys: Tensor, values: Tensor, layer: int, *_: object, **__: object
    ) -> tuple[Tensor, Tensor]:
        """Write the batch's keys and values, (1, heads, tokens, head_dim).

        Returns:
            All slots of the layer, each (slots, heads, max_length, head_dim).
        """
        batch = self._batch
        if batch is None:
            raise RuntimeError("select a batch before the forward pass")
        if layer == len(self._keys):
            for stores, new in ((self._keys, keys), (self._values, values)):
                shape = (self.slots, new.shape[1], self.max_length, new.shape[3])
                # Written, so that the memory is there and not only promised.
                stores.append(lasting_zeros(shape, new.dtype, new.device).zero_())
        stored = self._keys[layer], self._values[layer]
        for store, new in zip(stored, (keys, values), strict=True):
            # Advanced indexes around the heads' slice give (tokens, heads, head_dim).
            store[batch.slots, :, batch.written] = new[0].transpose(0, 1)
        return stored

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Return 0: where tokens are, the batch says, and a base that counts itself is wrong."""
        return 0

    def row(self, batch: Batch) -> RowCache:
        """Return the cache of a batch of one span, as transformers' own attention reads it."""
        self.select(batch)
        return RowCache(self, batch.spans[0])

    def distrust(self, slot: int) -> None:
        """Note that a slot may hold what is not finite; it is cleared before anybody reads it.

        What is masked is multiplied by 0, which does not undo a NaN. Touches no memory: it may be
        the device that has failed.
        """
        self._distrusted.add(slot)

    @torch.inference_mode()
    def claim(self, slot: int) -> None:
        """Make a slot fit for a row that begins or is moved there."""
        if slot in self._distrusted:
            for store in (*self._keys, *self._values):
                store[slot].zero_()
            self._distrusted.discard(slot)

    @torch.inference_mode()
    def spoil(self, slot: int) -> None:
        """Fill a slot with what shows in a row that reads it before it is written.

        Large and finite, since what is masked counts 0 times what is there; of either sign, since a
        score that is very low hides a value as well.
        """
        for store in (*self._keys, *self._values):
            store[slot, :, ::2] = _SPOILT
            store[slot, :, 1::2] = -_SPOILT

    @torch.inference_mode()
    def move(self, source: int, target: int, length: int) -> None:
        """Copy the first `length` positions of slot `source` to slot `target`, which is claimed."""
        self.claim(target)
        for store in (*self._keys, *self._values):
            store[target, :, :length].copy_(store[source, :, :length])
        if source in self._distrusted:
            self._distrusted.add(target)


class RowCache:
    """One row of a `SlotCache` for the length of a pass: its tokens so far, and no others.

    What transformers' own caches are asked for, but for states that are no keys and values.
    """

    def __init__(self, slots: SlotCache, span: Span) -> None:
        """View the row that `span` belongs to; its tokens are those that the pass writes."""
        self._slots = slots
        self._span = span
        self._written: set[int] = set()

    def update(
        self, keys: Tensor, values: Tensor, layer: int, *_: Any, **__: Any
    ) -> tuple[Tensor, Tensor]:
        """Write keys and values (1, heads, tokens, head_dim); return those of the row so far."""
        span = self._span
        stored = self._slots.update(keys, values, layer)
        self._written.add(layer)
        keys, values = (
            store[span.slot : span.slot + 1, :, span.start : span.end] for store in stored
        )
        return keys, values

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Return how many tokens of the row a layer holds."""
        span = self._span
        end = span.end if layer_idx in self._written else span.position
        return end - span.start

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        """Return how many positions a mask is for, and where they begin."""
        return self._span.position - self._span.start + query_length, 0

    def get_query_offset(self, layer_idx: int = 0) -> int:
        """Return the position of the pass's first token."""
        return self._span.position - self._span.start

    @property
    def is_sliding(self) -> list[bool]:
        """No layer forgets what its window has passed."""
        return [False]

    @property
    def is_compileable(self) -> bool:
        """False: it is made anew for every pass."""
        return False

    def __getattr__(self, name: str) -> Any:
        """Say what a base asks for that is not here; it may ask whether it is.

        Raises:
            AttributeError: Always.
        """
        raise AttributeError(f"it asks its cache for {name}, which no key-value cache here has")


class TokenStore:
    """The tokens of all slots, for bases without keys and values: every pass runs whole rows."""

    def __init__(self, slots: int, max_length: int) -> None:
        """Make an empty store for `slots` rows of `max_length` tokens."""
        self._ids = torch.zeros(slots, max_length, dtype=torch.int64)

    @property
    def nbytes(self) -> int:
        """Bytes allocated."""
        return self._ids.nbytes

    def whole(self, span: Span) -> Span:
        """Write a span's tokens; return the span of its row from the first token to the last."""
        self._ids[span.slot, span.position : span.end] = torch.tensor(span.ids)
        ids = self._ids[span.slot, span.start : span.end].tolist()
        return Span(span.slot, ids, span.start, span.start, span.whole)

    def distrust(self, slot: int) -> None:
        """Tokens are always finite."""

    def claim(self, slot: int) -> None:
        """A row writes its tokens before it reads them."""

    def spoil(self, slot: int) -> None:
        """A row writes its tokens before it reads them."""

    def move(self, source: int, target: int, length: int) -> None:
        """Copy the first `length` tokens of slot `source` to slot `target`."""
        self._ids[target, :length] = self._ids[source, :length]

"""The key-value cache: one slot a running row, filled by position.

It is what a transformers model calls `past_key_values`; of that protocol only `update` is used,
since mask and positions are the batch's. Reading is the attention's business (`attention.py`).
"""

from __future__ import annotations

import torch
from torch import Tensor

from superpose_server.model.batch import Batch
from superpose_server.model.memory import lasting_zeros


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
            shape = (self.slots, keys.shape[1], self.max_length, keys.shape[3])
            # Written, so that the memory is there and not only promised.
            self._keys.append(lasting_zeros(shape, keys.dtype, keys.device).zero_())
            self._values.append(lasting_zeros(shape, values.dtype, values.device).zero_())
        stored = self._keys[layer], self._values[layer]
        for store, new in zip(stored, (keys, values), strict=True):
            # Advanced indexes around the heads' slice give (tokens, heads, head_dim).
            store[batch.slots, :, batch.written] = new[0].transpose(0, 1)
        return stored

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
    def move(self, source: int, target: int, length: int) -> None:
        """Copy the first `length` positions of slot `source` to slot `target`, which is claimed."""
        self.claim(target)
        for store in (*self._keys, *self._values):
            store[target, :, :length].copy_(store[source, :, :length])
        if source in self._distrusted:
            self._distrusted.add(target)

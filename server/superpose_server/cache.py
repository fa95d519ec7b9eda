"""The key-value cache: one slot a running row, filled by position.

Rows are kept in slots 0..n-1 without gaps, so that a batch reads a *view* of the cache. The cache
is what a transformers model calls `past_key_values`; of that protocol only `update` is used, since
mask and positions are given explicitly.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Window:
    """Which part of the cache a forward pass writes and reads.

    Attributes:
        first: First slot of the batch; row i of the batch is slot first + i.
        positions: int64 (rows, tokens): where in its slot each token is written.
        length: Positions 0..length-1 of each slot are read.
    """

    first: int
    positions: Tensor
    length: int


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
        self._window: Window | None = None
        self._rows = torch.empty(0)

    @property
    def nbytes(self) -> int:
        """Bytes allocated."""
        return sum(t.numel() * t.element_size() for t in (*self._keys, *self._values))

    def select(self, window: Window) -> None:
        """Choose what the next forward pass writes and reads."""
        self._window = window
        rows, tokens = window.positions.shape
        self._rows = torch.arange(
            window.first, window.first + rows, device=window.positions.device
        )[:, None].expand(rows, tokens)

    def update(
        self, keys: Tensor, values: Tensor, layer: int, *_: object, **__: object
    ) -> tuple[Tensor, Tensor]:
        """Write (rows, heads, tokens, head_dim) and return what the rows can read.

        Returns:
            Keys and values, each (rows, heads, length, head_dim), as views of the cache.
        """
        window = self._window
        if window is None:
            raise RuntimeError("select a window before the forward pass")
        if layer == len(self._keys):
            shape = (self.slots, keys.shape[1], self.max_length, keys.shape[3])
            self._keys.append(torch.zeros(shape, dtype=keys.dtype, device=keys.device))
            self._values.append(torch.zeros(shape, dtype=values.dtype, device=values.device))
        last = window.first + keys.shape[0]
        read = []
        for store, new in ((self._keys[layer], keys), (self._values[layer], values)):
            # Advanced indexes around the heads' slice give (rows, tokens, heads, head_dim).
            store[self._rows, :, window.positions] = new.transpose(1, 2)
            read.append(store[window.first : last, :, : window.length])
        return read[0], read[1]

    @torch.inference_mode()
    def clear(self, slot: int) -> None:
        """Write zeros over a slot, whose keys or values may not be finite."""
        for store in (*self._keys, *self._values):
            store[slot].zero_()

    @torch.inference_mode()
    def move(self, source: int, target: int, length: int) -> None:
        """Copy the first `length` positions of slot `source` to slot `target`."""
        for store in (*self._keys, *self._values):
            store[target, :, :length].copy_(store[source, :, :length])

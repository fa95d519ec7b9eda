"""What one forward pass runs: tokens of several rows, laid end to end, without padding."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

# Added to the positions of a text that is longer than the base's switch-over length.
BEYOND = 1 << 32


@dataclass(frozen=True)
class Span:
    """Some consecutive tokens of one row.

    Attributes:
        slot: Slot of the cache that holds the row's keys and values.
        ids: The tokens.
        position: Where in the slot the first of them is written.
        start: Where in the slot the row begins; not 0 only where rows share a slot.
        whole: Tokens of the text that is run, of which these are some; None: no more than up to
            the last of these. Some bases run a long text with other frequencies from its first
            token on.
    """

    slot: int
    ids: Sequence[int]
    position: int
    start: int = 0
    whole: int | None = None

    @property
    def end(self) -> int:
        """Position in the slot after the last token."""
        return self.position + len(self.ids)

    @property
    def text(self) -> int:
        """Tokens of the text that is run."""
        return self.end - self.start if self.whole is None else self.whole

    @property
    def decodes(self) -> bool:
        """True if it is one token of a row that has its slot to itself."""
        return len(self.ids) == 1 and self.start == 0


@dataclass(frozen=True, eq=False)
class Batch:
    """Spans as tensors, one element a token: int64 (tokens,) on the model's device.

    Attributes:
        spans: What it was made from.
        ids: Tokens.
        slots: Slot of each.
        written: Position of each in its slot, counted from the slot's beginning.
        starts: Position of its row's beginning in the slot.
        positions: Position of each in its row, as the model counts; plus `BEYOND` in a text that
            is longer than the base's `switch` (`rope.py`).
        rows: Index of its span.
    """

    spans: tuple[Span, ...]
    ids: Tensor
    slots: Tensor
    written: Tensor
    starts: Tensor
    positions: Tensor
    rows: Tensor

    @classmethod
    def of(cls, spans: Sequence[Span], device: torch.device, switch: int | None = None) -> Batch:
        """Lay `spans` end to end, for a base whose frequencies change beyond `switch` tokens."""
        counts = [len(span.ids) for span in spans]
        # What takes a position in the slot to the model's.
        shifts = [
            (BEYOND if switch is not None and span.text > switch else 0) - span.start
            for span in spans
        ]
        columns = (
            [token for span in spans for token in span.ids],
            [span.slot for span in spans for _ in span.ids],
            [at for span in spans for at in range(span.position, span.end)],
            [span.start for span in spans for _ in span.ids],
            [
                at + shift
                for span, shift in zip(spans, shifts, strict=True)
                for at in range(span.position, span.end)
            ],
            [row for row, count in enumerate(counts) for _ in range(count)],
        )
        tensors = torch.tensor(columns, dtype=torch.int64).to(device).unbind()
        if device.type == "cpu":
            # Each in storage of its own: a compiled graph is for one offset.
            tensors = tuple(column.clone() for column in tensors)
        return cls(tuple(spans), *tensors)

    def at_least(self, tokens: int) -> Batch:
        """Return the batch with its last token repeated until there are `tokens`."""
        missing = tokens - len(self.ids)
        if missing <= 0:
            return self
        return Batch(self.spans, *(torch.cat((c, c[-1:].expand(missing))) for c in self.columns))

    @property
    def columns(self) -> tuple[Tensor, ...]:
        """All tensors, in their order."""
        return self.ids, self.slots, self.written, self.starts, self.positions, self.rows

    @property
    def decodes(self) -> bool:
        """True if every span is one token of a row that has its slot to itself."""
        return all(span.decodes for span in self.spans)

"""Decode steps captured once a bucket and replayed: on a GPU, launching costs more than computing.

A bucket is a number of rows and a length of cache that is read. Parameters, cache and inputs keep
their addresses, so that folds write under a captured step and a replay sees what they wrote.
"""

from __future__ import annotations

import gc
from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from superpose_adapters.one_line import one_line
from superpose_server.model.batch import Batch, Span

Step = Callable[[], Tensor]

_SHORTEST = 128


class CaptureError(RuntimeError):
    """A step ran, but cannot be captured: it waits for the device, say."""


class GpuCapture:
    """Captures steps into one pool of memory, since only one of them runs at a time."""

    def __init__(self) -> None:
        """Begin with an empty pool."""
        self._pool = torch.cuda.graph_pool_handle()
        # What garbage holds on the device would be freed by a collection within a capture, which
        # ends it with an error.
        gc.collect()

    def __call__(self, step: Step) -> Step:
        """Return a replay of `step`, which must allocate nothing that outlives it but its result.

        The result holds until another step of the pool is replayed.

        Raises:
            CaptureError: The step does what a capture forbids.
        """
        side = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):  # Libraries set themselves up outside the capture.
            step()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        # What other threads do on the device is theirs.
        mode = "thread_local"
        try:
            with _no_collection(), torch.cuda.graph(graph, self._pool, capture_error_mode=mode):
                result = step()
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            # Leaving the capture fails too then; what began it is the first.
            raise CaptureError(one_line(error.__context__ or error)) from error

        def replay() -> Tensor:
            graph.replay()
            return result

        return replay


@contextmanager
def _no_collection() -> Iterator[None]:
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


class DecodeGraphs:
    """Captured decode steps, by bucket."""

    def __init__(
        self,
        forward: Callable[[Batch, Tensor], Tensor],
        *,
        rows: int,
        length: int,
        scratch_slot: int,
        device: torch.device,
        capture: Callable[[Step], Step],
    ) -> None:
        """Capture all buckets, the largest first, so that smaller ones share its memory.

        Args:
            forward: Runs a batch and returns the float32 logits at some of its tokens.
            rows: Rows that run at most, in slots 0..rows-1.
            length: Tokens of a slot.
            scratch_slot: Where rows that only fill a bucket write.
            device: Of the inputs.
            capture: Turns a step into its replay, as `GpuCapture` does.
        """
        self._scratch = scratch_slot
        self._rows = _powers(1, rows)
        self._lengths = _powers(min(_SHORTEST, length), length)
        # Token, slot and position of each row. Row i reads slot i; it writes there too, unless it
        # only fills the bucket.
        self._inputs = torch.zeros(3, rows, dtype=torch.int64, device=device)
        self._starts = torch.zeros(rows, dtype=torch.int64, device=device)
        self._keep = torch.arange(rows, device=device)
        self._steps: dict[tuple[int, int], Step] = {}
        for bucket in reversed([(n, m) for n in self._rows for m in self._lengths]):
            self._steps[bucket] = capture(self._step(forward, *bucket))

    def _step(self, forward: Callable[[Batch, Tensor], Tensor], rows: int, length: int) -> Step:
        batch = Batch(
            tuple(Span(slot, (0,), length - 1) for slot in range(rows)),
            self._inputs[0, :rows],
            self._inputs[1, :rows],
            self._inputs[2, :rows],
            self._starts[:rows],
            self._inputs[2, :rows],
            self._keep[:rows],
        )
        return lambda: forward(batch, self._keep[:rows])

    def can_run(self, spans: Sequence[Span], wanted: Sequence[int]) -> bool:
        """Return whether this is a decode step whose logits are all wanted, in order."""
        return list(wanted) == list(range(len(spans))) and all(
            span.decodes and span.slot < self._scratch for span in spans
        )

    def run(self, spans: Sequence[Span]) -> Tensor:
        """Run one token for each of `spans`, rows that have their slots to themselves.

        Returns:
            float32 (len(spans), vocabulary), which may hold until the next step only.
        """
        last = max(span.slot for span in spans) + 1
        rows = self._rows[bisect_left(self._rows, last)]
        length = self._lengths[bisect_left(self._lengths, max(span.end for span in spans))]
        # The scratch slot's last position ends whatever text is scored there: no later slice reads
        # what nobody writes there.
        columns = [(0, self._scratch, self._lengths[-1] - 1)] * len(self._keep)
        for span in spans:
            columns[span.slot] = (span.ids[0], span.slot, span.position)
        self._inputs.copy_(torch.tensor(columns, dtype=torch.int64).T)
        logits = self._steps[rows, length]()
        slots = [span.slot for span in spans]
        return logits[: len(slots)] if slots == list(range(len(slots))) else logits[slots]


def _powers(least: int, most: int) -> list[int]:
    """Return least, 2 least, 4 least, ... and `most`."""
    sizes = [least]
    while sizes[-1] * 2 < most:
        sizes.append(sizes[-1] * 2)
    return sizes if sizes[-1] == most else [*sizes, most]

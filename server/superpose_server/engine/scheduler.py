"""Who runs, and what of it in a step: a bounded first-come queue before a fixed number of slots."""

from __future__ import annotations

import threading
from collections import deque
from dataclasses import dataclass

from superpose_server.engine.sequence import Sequence
from superpose_server.errors import QueueFull, ShuttingDown
from superpose_server.model.batch import Span

RETRY_AFTER_SECONDS = 1.0


@dataclass(frozen=True)
class Scheduled:
    """What a step runs of one row: its newest token, or some of its prompt."""

    row: Sequence
    span: Span

    @property
    def chooses(self) -> bool:
        """True if the logits after its last token choose the row's next token."""
        return self.span.end == self.row.length

    def ran(self) -> None:
        """Note in the row that it is done."""
        self.row.computed = self.span.end


class Scheduler:
    """The rows that wait and the rows that run.

    `submit` may be called from any thread; the rest belongs to the engine thread. Running rows are
    in slots 0..n-1, in the order of `running`.
    """

    def __init__(self, slots: int, max_queue: int, switch: int | None = None) -> None:
        """Make an empty schedule.

        Args:
            slots: Rows that run at once.
            max_queue: Rows that wait at most.
            switch: A row that becomes longer is run anew from its first token; None: none is.
        """
        self.slots = slots
        self._switch = switch
        self.max_queue = max_queue
        self.running: list[Sequence] = []
        self._waiting: deque[Sequence] = deque()
        self._lock = threading.Lock()
        self._open = True

    @property
    def waiting(self) -> int:
        """Number of rows that wait."""
        return len(self._waiting)

    @property
    def idle(self) -> bool:
        """True if no row runs or waits."""
        # In this order: a row that is admitted meanwhile is put into `running` first.
        return not self._waiting and not self.running

    def submit(self, sequence: Sequence) -> None:
        """Put a row at the end of the queue.

        Raises:
            QueueFull: `max_queue` rows wait already.
            ShuttingDown: `close` was called.
        """
        with self._lock:
            if not self._open:
                raise ShuttingDown
            free = self.slots - len(self.running)
            if len(self._waiting) >= self.max_queue + max(0, free):
                raise QueueFull(self.max_queue, RETRY_AFTER_SECONDS)
            self._waiting.append(sequence)

    def close(self) -> None:
        """Take no more rows."""
        with self._lock:
            self._open = False

    def admit(self) -> Sequence | None:
        """Return the row that runs next, in slot `len(running) - 1`; None if none can."""
        with self._lock:
            if not self._waiting or len(self.running) >= self.slots:
                return None
            sequence = self._waiting[0]
            # In this order, so that `idle` finds it in one place or the other.
            self.running.append(sequence)
            self._waiting.popleft()
            return sequence

    def schedule(self, budget: int) -> list[Scheduled]:
        """Return what the next step runs: every decoding row's newest token, then prompts.

        Prompts, and rows that are run anew, get `budget` tokens together, first come first served,
        so that no running row waits for more than that.
        """
        slots = list(enumerate(self.running))
        for _, row in slots:
            if self._switch is not None and row.begun_as <= self._switch < row.length:
                row.computed = 0
        scheduled = [
            Scheduled(row, Span(slot, row.tokens[-1:], row.computed))
            for slot, row in slots
            if row.decoding
        ]
        prompts = [(slot, row) for slot, row in slots if not row.decoding]
        for slot, row in sorted(prompts, key=lambda pair: pair[1].started):
            ids = row.next_ids(budget)
            if ids:
                if row.computed == 0:
                    row.begun_as = row.length
                span = Span(slot, ids, row.computed, whole=row.length)
                scheduled.append(Scheduled(row, span))
                budget -= len(ids)
        return scheduled

    def drop_waiting(self, cancelled_only: bool) -> list[Sequence]:
        """Take rows out of the queue and return them."""
        with self._lock:
            dropped = [s for s in self._waiting if s.cancelled or not cancelled_only]
            if dropped:
                self._waiting = deque(s for s in self._waiting if s not in dropped)
            return dropped

    def drop_running(self) -> list[Sequence]:
        """Free every slot at once; return the rows that ran."""
        rows, self.running = self.running, []
        return rows

    def release(self, slot: int) -> int | None:
        """Free a slot; return the slot whose row must be moved into it, if one must.

        The last row takes the place of the one that left, so that running rows stay without gaps.
        """
        last = self.running.pop()
        if slot == len(self.running):
            return None
        self.running[slot] = last
        return len(self.running)

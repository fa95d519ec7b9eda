"""Open-loop sending: at times fixed beforehand, whatever became of what was sent before.

A sender that waits for replies slows down with the server and hides what users would feel. Here
every action has a time at which it is due, and is measured from then.
"""

from __future__ import annotations

import asyncio
import itertools
import random
import time
from collections.abc import Awaitable, Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Protocol


class Clock(Protocol):
    """Seconds that pass, and a way to wait for some."""

    def now(self) -> float:
        """Return the time."""

    async def sleep(self, seconds: float) -> None:
        """Wait."""


class RealClock:
    """The machine's own time, that of `time.perf_counter`."""

    def now(self) -> float:
        """Return the time."""
        return time.perf_counter()

    async def sleep(self, seconds: float) -> None:
        """Wait."""
        await asyncio.sleep(seconds)


@dataclass(frozen=True)
class Sent:
    """One action: when it was due, and when it was begun."""

    due: float
    begun: float

    @property
    def late(self) -> float:
        """Seconds between the two."""
        return self.begun - self.due


def steady_times(rate: float) -> Iterator[float]:
    """Yield times from 0 on, `rate` a second, evenly spaced, without end; none at rate 0."""
    if rate > 0:
        yield from (index / rate for index in itertools.count())


def poisson_times(rate: float, seconds: float, seed: int) -> list[float]:
    """Return the times of a Poisson process of `rate` a second."""
    draw = random.Random(seed)
    times: list[float] = []
    at = draw.expovariate(rate)
    while at < seconds:
        times.append(at)
        at += draw.expovariate(rate)
    return times


async def send(
    times: Iterable[float],
    action: Callable[[int, float], Awaitable[None]],
    *,
    concurrency: int | None = None,
    stop: Callable[[], bool] = lambda: False,
    clock: Clock | None = None,
) -> list[Sent]:
    """Begin `action(index, due)` at each of `times` from now on, and wait until all have ended.

    Args:
        times: Ascending, in seconds from now.
        action: Gets its index and when it was due on the clock. An exception ends everything.
        concurrency: At most so many at once; one that must wait for another is late.
        stop: Looked at when the next action is due; true ends the sending.
        clock: Real time without it.
    """
    clock = clock or RealClock()
    slots = asyncio.Semaphore(concurrency) if concurrency is not None else None
    start = clock.now()
    sent: list[Sent] = []

    async def run(index: int, due: float) -> None:
        try:
            await action(index, due)
        finally:
            if slots is not None:
                slots.release()

    async with asyncio.TaskGroup() as group:
        for index, offset in enumerate(times):
            due = start + offset
            wait = due - clock.now()
            if wait > 0:
                await clock.sleep(wait)
            if slots is not None:
                await slots.acquire()
            if stop():
                break
            sent.append(Sent(due, clock.now()))
            group.create_task(run(index, due))
    return sent

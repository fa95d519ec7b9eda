from __future__ import annotations

import asyncio
import heapq
import itertools
from collections.abc import Awaitable, Callable

import pytest
from benchmarks.openloop import Sent, poisson_times, send, steady_times


class FakeClock:
    """Time that passes only where every task waits for it."""

    def __init__(self) -> None:
        self.time = 100.0
        self._order = itertools.count()
        self._sleeping: list[tuple[float, int, asyncio.Event]] = []

    def now(self) -> float:
        return self.time

    async def sleep(self, seconds: float) -> None:
        wake = asyncio.Event()
        heapq.heappush(self._sleeping, (self.time + seconds, next(self._order), wake))
        await wake.wait()

    async def run(self, work: Awaitable[list[Sent]]) -> list[Sent]:
        task = asyncio.ensure_future(work)
        while not task.done():
            for _ in range(20):  # until nobody can go on
                await asyncio.sleep(0)
            if self._sleeping and not task.done():
                self.time, _, wake = heapq.heappop(self._sleeping)
                wake.set()
        return task.result()


def sent_with(
    times: list[float],
    seconds: float,
    *,
    concurrency: int | None = None,
    stop: Callable[[FakeClock], bool] = lambda clock: False,
) -> tuple[list[Sent], list[tuple[int, float, float]]]:
    """Send actions that take `seconds`; return what was sent and (index, due, end) of each."""
    ended: list[tuple[int, float, float]] = []

    async def main() -> list[Sent]:
        clock = FakeClock()

        async def action(index: int, due: float) -> None:
            await clock.sleep(seconds)
            ended.append((index, due, clock.now()))

        return await clock.run(
            send(times, action, concurrency=concurrency, clock=clock, stop=lambda: stop(clock))
        )

    return asyncio.run(main()), ended


def test_slow_answers_hold_nothing_up() -> None:
    sent, ended = sent_with([0.0, 1.0, 2.0, 3.0], seconds=10.0)
    assert [s.due for s in sent] == [s.begun for s in sent] == [100.0, 101.0, 102.0, 103.0]
    assert ended == [(i, 100.0 + i, 110.0 + i) for i in range(4)]


def test_what_finds_no_slot_is_sent_late_and_still_due_when_it_was() -> None:
    sent, _ = sent_with([0.0, 1.0, 2.0, 30.0], seconds=10.0, concurrency=2)
    assert [s.due for s in sent] == [100.0, 101.0, 102.0, 130.0]
    assert [s.late for s in sent] == [0.0, 0.0, 8.0, 0.0]


def test_it_stops_when_told_and_waits_for_what_was_sent() -> None:
    sent, ended = sent_with(
        [0.0, 1.0, 2.0, 3.0], seconds=10.0, stop=lambda clock: clock.now() >= 102.0
    )
    assert len(sent) == 2
    assert [end for _, _, end in ended] == [110.0, 111.0]


def test_a_failed_action_ends_everything() -> None:
    async def action(index: int, due: float) -> None:
        raise RuntimeError("no")

    with pytest.raises(ExceptionGroup) as caught:
        asyncio.run(send([0.0], action))
    assert caught.group_contains(RuntimeError, match="no")


def test_steady_times_are_even_and_endless() -> None:
    assert list(itertools.islice(steady_times(4.0), 5)) == [0.0, 0.25, 0.5, 0.75, 1.0]
    assert list(steady_times(0)) == []


def test_poisson_times_have_their_rate_and_are_the_same_for_the_same_seed() -> None:
    times = poisson_times(50.0, 200.0, seed=1)
    assert times == poisson_times(50.0, 200.0, seed=1) != poisson_times(50.0, 200.0, seed=2)
    assert times == sorted(times)
    assert 0 < times[0] < times[-1] < 200
    # Of 10,000 expected arrivals the standard deviation is 100; gaps vary as much as they last.
    assert abs(len(times) - 10_000) < 500
    gaps = [b - a for a, b in itertools.pairwise(times)]
    mean = sum(gaps) / len(gaps)
    deviation = (sum((gap - mean) ** 2 for gap in gaps) / len(gaps)) ** 0.5
    assert deviation / mean == pytest.approx(1.0, abs=0.05)

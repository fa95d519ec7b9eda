from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from typing import Any

import pytest

from superpose_server.engine.sequence import Chunk, FinishReason
from superpose_server.errors import ShuttingDown
from superpose_server.inference.delivery import Delivery, Inbox

STREAMS = 32
LAST = Chunk("!", (9,), (-0.5,), FinishReason.LENGTH)


class Loop(asyncio.SelectorEventLoop):
    """A loop that counts who wakes it, and whose clock stands still until it is set."""

    def __init__(self) -> None:
        self.wakes = 0
        self.timers: list[tuple[float, Callable[..., object]]] = []
        self.now = 0.0
        super().__init__()

    def time(self) -> float:
        return self.now

    def call_soon_threadsafe(self, *args: Any, **kwargs: Any) -> Any:  # type: ignore[override]
        self.wakes += 1
        return super().call_soon_threadsafe(*args, **kwargs)

    def call_at(self, *args: Any, **kwargs: Any) -> Any:  # type: ignore[override]
        when, callback = args
        self.timers.append((when, callback))

    def reach_next_timer(self) -> None:
        self.now, callback = self.timers.pop()
        callback()


def run(work: Callable[[Loop, Delivery], Any]) -> None:
    """Run an async test on a `Loop` of its own."""
    loop = Loop()
    with asyncio.Runner(loop_factory=lambda: loop) as runner:
        runner.run(work(loop, Delivery(loop)))


def step(inboxes: list[Inbox], chunk: Chunk) -> None:
    """Hand a chunk to each inbox as the engine does: on another thread, all before the loop."""

    def hand_out() -> None:
        for inbox in inboxes:
            inbox.put(chunk)

    engine = threading.Thread(target=hand_out)
    engine.start()
    engine.join()


async def settle() -> None:
    """Let everything that can go on do so."""
    for _ in range(5):
        await asyncio.sleep(0)


async def waiting(inboxes: list[Inbox], *, whole: bool = False) -> list[asyncio.Task[Chunk]]:
    tasks = [asyncio.ensure_future(inbox.take(whole=whole)) for inbox in inboxes]
    await settle()
    return tasks


def test_a_step_wakes_the_loop_once_for_all_streams() -> None:
    async def work(loop: Loop, delivery: Delivery) -> None:
        inboxes = [delivery.inbox() for _ in range(STREAMS)]
        tasks = await waiting(inboxes)
        for index, inbox in enumerate(inboxes):
            step([inbox], Chunk(str(index), (index,)))
        assert loop.wakes == 1
        chunks = await asyncio.gather(*tasks)
        assert [chunk.text for chunk in chunks] == [str(index) for index in range(STREAMS)]

    run(work)


def test_chunks_that_nobody_takes_become_one_and_wake_nobody() -> None:
    async def work(loop: Loop, delivery: Delivery) -> None:
        inbox = delivery.inbox()
        step([inbox], Chunk("a", (1,), (-1.0,)))
        step([inbox], Chunk("", (2,), (-2.0,)))
        step([inbox], LAST)
        assert loop.wakes == 0
        assert await inbox.take() == Chunk("a!", (1, 2, 9), (-1.0, -2.0, -0.5), FinishReason.LENGTH)

    run(work)


def test_an_error_comes_with_what_was_made_before_it() -> None:
    async def work(loop: Loop, delivery: Delivery) -> None:
        inbox, error = delivery.inbox(), ShuttingDown()
        step([inbox], Chunk("a", (1,)))
        step([inbox], Chunk(error=error))
        assert await inbox.take() == Chunk("a", (1,), error=error)

    run(work)


@pytest.mark.parametrize("end", [LAST, Chunk(error=ShuttingDown())], ids=["finish", "error"])
def test_who_wants_the_whole_is_woken_by_the_end_alone(end: Chunk) -> None:
    async def work(loop: Loop, delivery: Delivery) -> None:
        inbox = delivery.inbox()
        (task,) = await waiting([inbox], whole=True)
        step([inbox], Chunk("a", (1,)))
        step([inbox], Chunk("b", (2,)))
        await settle()
        assert loop.wakes == 0
        assert not task.done()
        step([inbox], end)
        chunk = await task
        assert loop.wakes == 1
        assert chunk.text == "ab" + end.text
        assert (chunk.finish_reason, chunk.error) == (end.finish_reason, end.error)

    run(work)


def test_a_request_that_is_gone_holds_up_no_other() -> None:
    async def work(loop: Loop, delivery: Delivery) -> None:
        inboxes = [delivery.inbox() for _ in range(3)]
        tasks = await waiting(inboxes)
        step(inboxes, Chunk("a", (1,)))
        tasks[0].cancel()  # Between the step and the loop's turn.
        assert [(await task).text for task in tasks[1:]] == ["a", "a"]
        tasks = await waiting(inboxes[1:])
        loop.now += 1.0
        step(inboxes, Chunk("b", (2,)))
        assert [(await task).text for task in tasks] == ["b", "b"]

    run(work)


def test_many_streams_rest_longer_between_their_responses() -> None:
    """With steps quicker than responses, responses of several tokens go out, more rarely."""

    async def rest(loop: Loop, delivery: Delivery, streams: int) -> float:
        inboxes = [delivery.inbox() for _ in range(streams)]
        tasks = await waiting(inboxes)
        step(inboxes, Chunk("a", (1,)))
        await asyncio.gather(*tasks)  # The first step is sent at once.
        tasks = await waiting(inboxes)
        step(inboxes, Chunk("b", (2,)))
        await settle()
        step(inboxes, Chunk("c", (3,)))
        await settle()
        assert not any(task.done() for task in tasks)
        began = loop.now
        loop.reach_next_timer()
        assert [(await task).token_ids for task in tasks] == [(2, 3)] * streams
        return loop.now - began

    async def work(loop: Loop, delivery: Delivery) -> None:
        one = await rest(loop, delivery, 1)
        loop.now += 1.0
        many = await rest(loop, delivery, STREAMS)
        assert many == pytest.approx(STREAMS * one)
        loop.now += 1.0
        inbox = delivery.inbox()
        (task,) = await waiting([inbox])
        step([inbox], LAST)
        assert await task == LAST  # After a pause nobody rests.
        assert not loop.timers

    run(work)


def test_the_engine_outlives_the_loop() -> None:
    loop = asyncio.new_event_loop()
    inbox = Delivery(loop).inbox()

    async def leave() -> None:
        task = asyncio.ensure_future(inbox.take())
        await settle()
        task.cancel()

    loop.run_until_complete(leave())
    loop.close()
    inbox.put(Chunk("a", (1,)))
    inbox.put(LAST)


def test_streams_get_all_their_chunks_in_order_while_the_engine_runs() -> None:
    steps = 2000

    async def read(inbox: Inbox, whole: bool) -> list[int]:
        tokens: list[int] = []
        chunk = Chunk()
        while not chunk.last:
            chunk = await inbox.take(whole=whole)
            tokens += chunk.token_ids
        return tokens

    async def work() -> None:
        delivery = Delivery(asyncio.get_running_loop())
        inboxes = [delivery.inbox() for _ in range(4)]

        def engine() -> None:
            for number in range(steps):
                reason = FinishReason.LENGTH if number == steps - 1 else None
                for inbox in inboxes:
                    inbox.put(Chunk(token_ids=(number,), finish_reason=reason))

        thread = threading.Thread(target=engine)
        thread.start()
        results = await asyncio.gather(
            *(read(inbox, index == 0) for index, inbox in enumerate(inboxes))
        )
        thread.join()
        assert results == [list(range(steps))] * len(inboxes)

    asyncio.run(work())

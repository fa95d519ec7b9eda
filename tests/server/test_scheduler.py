from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from superpose_server.engine.scheduler import Scheduler
from superpose_server.errors import QueueFull, ShuttingDown


class Row:
    """All that a scheduler knows of a row."""

    def __init__(self, name: int) -> None:
        self.name = name
        self.cancelled = False


def submit(scheduler: Scheduler, *names: int) -> list[Any]:
    rows: list[Any] = [Row(name) for name in names]
    for row in rows:
        scheduler.submit(row)
    return rows


def names(rows: Any) -> list[int]:
    return [row.name for row in rows]


def admit_all(scheduler: Scheduler) -> None:
    while scheduler.admit() is not None:
        pass


def test_rows_run_first_come_first_served_in_ascending_slots() -> None:
    scheduler = Scheduler(slots=2, max_queue=5)
    submit(scheduler, 1, 2, 3)
    admit_all(scheduler)
    assert names(scheduler.running) == [1, 2]
    assert scheduler.waiting == 1
    assert scheduler.release(1) is None
    admit_all(scheduler)
    assert names(scheduler.running) == [1, 3]


def test_the_last_row_takes_the_place_of_one_that_left() -> None:
    scheduler = Scheduler(slots=4, max_queue=0)
    submit(scheduler, 0, 1, 2, 3)
    admit_all(scheduler)
    assert scheduler.release(1) == 3  # slot 3 is to be moved into slot 1
    assert names(scheduler.running) == [0, 3, 2]
    assert scheduler.release(0) == 2
    assert names(scheduler.running) == [2, 3]
    assert scheduler.release(1) is None
    assert scheduler.release(0) is None
    assert scheduler.idle


def test_a_full_queue_refuses_and_says_when_to_come_again() -> None:
    scheduler = Scheduler(slots=1, max_queue=2)
    submit(scheduler, 0)
    admit_all(scheduler)
    submit(scheduler, 1, 2)
    with pytest.raises(QueueFull, match="2 requests are waiting already") as caught:
        submit(scheduler, 3)
    assert caught.value.retry_after_seconds > 0
    scheduler.release(0)
    submit(scheduler, 4)  # there is room again
    assert scheduler.waiting == 3


def test_rows_that_a_free_slot_will_take_do_not_count_as_waiting() -> None:
    scheduler = Scheduler(slots=2, max_queue=0)
    submit(scheduler, 0, 1)
    with pytest.raises(QueueFull):
        submit(scheduler, 2)


def test_a_closed_scheduler_takes_no_more_and_keeps_what_it_has() -> None:
    scheduler = Scheduler(slots=1, max_queue=2)
    submit(scheduler, 0)
    scheduler.close()
    with pytest.raises(ShuttingDown):
        submit(scheduler, 1)
    admit_all(scheduler)
    assert names(scheduler.running) == [0]


def test_cancelled_rows_are_taken_out_of_the_queue() -> None:
    scheduler = Scheduler(slots=1, max_queue=9)
    rows = submit(scheduler, 0, 1, 2, 3)
    admit_all(scheduler)
    rows[0].cancelled = rows[2].cancelled = True
    assert names(scheduler.drop_waiting(cancelled_only=True)) == [2]  # 0 runs already
    assert scheduler.waiting == 2
    assert names(scheduler.drop_waiting(cancelled_only=False)) == [1, 3]
    assert scheduler.waiting == 0
    assert not scheduler.idle


@given(st.lists(st.sampled_from(["submit", "admit", "release"]), max_size=40), st.data())
def test_slots_never_have_gaps_and_no_row_is_lost(actions: list[str], data: st.DataObject) -> None:
    scheduler = Scheduler(slots=3, max_queue=4)
    expected: dict[int, int] = {}  # {slot: name}, moved as the scheduler says
    waiting: list[int] = []
    for name, action in enumerate(actions):
        if action == "submit":
            if len(waiting) < 4 + 3 - len(expected):
                submit(scheduler, name)
                waiting.append(name)
            else:
                with pytest.raises(QueueFull):
                    submit(scheduler, name)
        elif action == "admit":
            row = scheduler.admit()
            assert (row is not None) == bool(waiting and len(expected) < 3)
            if row is not None:
                expected[len(expected)] = waiting.pop(0)
        elif expected:
            slot = data.draw(st.integers(0, len(expected) - 1))
            moved = scheduler.release(slot)
            del expected[slot]
            if moved is not None:
                expected[slot] = expected.pop(moved)
        assert dict(enumerate(names(scheduler.running))) == expected
        assert scheduler.waiting == len(waiting)
        assert scheduler.idle == (not expected and not waiting)

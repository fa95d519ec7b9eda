from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from types import MappingProxyType
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.server.helpers import GREEDY, Client

from superpose_adapters.mix import BoundMix
from superpose_server.engine.scheduler import Scheduled, Scheduler
from superpose_server.engine.sequence import Sequence
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


# Texts that become too long for the frequencies that they began with.

SWITCH = 12


class Texts:
    """Real rows in a scheduler, whose steps choose tokens of no meaning."""

    def __init__(self, *prompts: int, slots: int = 4, switch: int | None = SWITCH) -> None:
        self.scheduler = Scheduler(slots, max_queue=9, switch=switch)
        self.rows = [self.add(length) for length in prompts]

    def add(self, length: int) -> Sequence:
        row = Sequence(range(1, length + 1), BoundMix("base"), GREEDY, Client(), TOKENIZER)
        self.scheduler.submit(row)
        row = self.scheduler.admit()  # type: ignore[assignment]
        row.started = len(self.scheduler.running)
        return row

    def step(self, budget: int) -> list[Scheduled]:
        """Run a step; what it has chosen is there afterwards."""
        scheduled = self.scheduler.schedule(budget)
        chosen = [item.row for item in scheduled if item.chooses]
        for item in scheduled:
            item.ran()
        for row in chosen:
            row.tokens.append(100 + len(row.tokens))
        return scheduled


class Tokens:
    """All that a row asks of a tokenizer before it has a text."""

    ends: frozenset[int] = frozenset()
    special: Mapping[str, int] = MappingProxyType({})

    def text_ids(self, ids: Iterable[int]) -> Iterator[int]:
        return iter(ids)

    def decode(self, ids: list[int]) -> str:
        return ""


TOKENIZER: Any = Tokens()


def spans_of(scheduled: list[Scheduled], row: Sequence) -> list[tuple[int, int, int]]:
    """(position, tokens, whole text) of what a step runs of a row."""
    return [(i.span.position, len(i.span.ids), i.span.text) for i in scheduled if i.row is row]


def test_a_row_that_crosses_the_length_runs_anew_within_the_budget_and_others_go_on() -> None:
    texts = Texts(SWITCH - 1, 3)
    crossing, other = texts.rows
    texts.step(99)
    texts.step(99)
    assert crossing.length == SWITCH + 1  # the newest of which has not run yet
    texts.add(6)
    for at in (0, 5, 10):
        before = other.length
        scheduled = texts.step(5)
        count = min(5, SWITCH + 1 - at)
        assert spans_of(scheduled, crossing) == [(at, count, SWITCH + 1)]
        assert other.length == before + 1
        assert sum(len(item.span.ids) for item in scheduled if not item.span.decodes) <= 5
    # It began first, so the late prompt has only got what it left.
    assert spans_of(scheduled, texts.scheduler.running[2]) == [(0, 2, 6)]
    assert crossing.length == SWITCH + 2
    # Once is enough.
    assert spans_of(texts.step(5), crossing) == [(SWITCH + 1, 1, SWITCH + 2)]
    assert crossing.tokens == list(range(100, 104))


def test_a_row_runs_anew_with_its_own_tokens() -> None:
    texts = Texts(SWITCH - 2)
    [row] = texts.rows
    while row.length <= SWITCH:
        texts.step(99)
    [item] = texts.step(99)
    assert list(item.span.ids) == [*range(1, SWITCH - 1), 100, 101, 102]


@given(
    prompts=st.lists(st.integers(1, 2 * SWITCH), min_size=1, max_size=4),
    budget=st.integers(1, 30),
    switch=st.sampled_from([None, 1, 2, SWITCH]),
)
def test_every_row_goes_on_and_its_tokens_are_those_of_one_length(
    prompts: list[int], budget: int, switch: int | None
) -> None:
    texts = Texts(*prompts, switch=switch)
    written: dict[Sequence, list[bool]] = {row: [] for row in texts.rows}  # beyond the length?
    for _ in range(400):
        decoding = {row: row.length for row in texts.rows if row.decoding}
        scheduled = texts.step(budget)
        # All but the newest tokens of rows that decode.
        pieces = [i.span for i in scheduled if i.span.position != decoding.get(i.row, 0) - 1]
        assert sum(len(span.ids) for span in pieces) <= budget
        for item in scheduled:
            beyond = switch is not None and item.span.text > switch
            done = written[item.row]
            assert item.span.position <= len(done)
            done[item.span.position :] = [beyond] * len(item.span.ids)
            if item.chooses:  # What chooses was read under one set of frequencies, the right one.
                length = item.span.end
                assert done == [switch is not None and length > switch] * length
        if all(len(row.tokens) > 2 * SWITCH for row in texts.rows):
            return
    raise AssertionError("a row does not go on")

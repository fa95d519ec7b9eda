from __future__ import annotations

import asyncio

import pytest
from benchmarks.load import Level, Traffic, run_level
from benchmarks.shapes import Group
from benchmarks.target import Streamed, Weights
from benchmarks.texts import Difference, Texts, key_of


def streamed(*arrivals: tuple[float, int]) -> Streamed:
    return Streamed([1], {}, 8, due=1.0, arrivals=list(arrivals), tokens=[0] * len(arrivals))


def test_each_token_of_a_chunk_counts_as_a_gap() -> None:
    request = streamed((2.0, 1), (3.0, 2), (3.5, 1))
    assert request.gaps(0.0, 10.0) == [1.0, 1.0, 0.5]
    assert request.first_token == 1.0


def test_gaps_and_tokens_are_taken_between_two_times() -> None:
    request = streamed((2.0, 1), (3.0, 2), (3.5, 1), (9.0, 1))
    assert request.gaps(2.5, 5.0) == [0.5]
    assert request.tokens_between(2.0, 3.5) == 3


def test_a_text_is_compared_as_far_as_the_reference_goes() -> None:
    texts = Texts()
    texts.learn(key_of(0, {"a": 1.0, "b": 2.0}), [1, 2])
    texts.learn(key_of(0, {"b": 2.0, "a": 1.0}), [1, 2, 3])
    texts.compare(key_of(0, {"a": 1.0, "b": 2.0}), [1, 2, 3, 4])
    assert (texts.texts, texts.tokens, texts.differences) == (1, 3, [])


def test_the_first_token_that_differs_is_kept() -> None:
    texts = Texts()
    key = key_of(1, {})
    texts.learn(key, [1, 2, 3])
    texts.compare(key, [1, 5, 6])
    texts.compare(key_of(2, {}), [1])
    assert texts.differences == [Difference(key, 1, 2, 5)]
    assert texts.unknown == 1


class Answers:
    """A target that answers at once, and refuses every third request."""

    def __init__(self) -> None:
        self.requests = 0

    async def stream(self, request: Streamed) -> None:
        self.requests += 1
        if self.requests % 3 == 0:
            request.end("RESOURCE_EXHAUSTED")
            return
        request.add(range(request.length))
        request.end("OK")

    async def change(self, mix: Weights) -> str:
        raise NotImplementedError

    async def generation(self) -> int:
        raise NotImplementedError


def test_a_level_counts_every_request_by_its_status() -> None:
    traffic = Traffic([[1, 2], [3, 4]], new_tokens=4, mixed=0.5, max_batch=2)
    level = asyncio.run(run_level(Answers(), traffic, rate=300.0, seconds=0.2, seed=3))
    answered, refused = level.statuses["OK"], level.statuses["RESOURCE_EXHAUSTED"]
    assert refused == len(level.requests) // 3 > 0
    assert answered + refused == len(level.requests)
    assert level.refused == pytest.approx(refused / len(level.requests))
    assert level.saturated(batch_seconds=1.0)
    assert {request.latency >= 0 for request in level.done} == {True}


def test_a_level_is_saturated_when_it_is_busy_long_after_the_last_arrival() -> None:
    request = Streamed([1], {}, 4, due=0.5, arrivals=[(9.0, 4)], status="OK", ended=9.0)
    level = Level(1.0, since=0.0, until=1.0, requests=[(0, request)])
    assert level.saturated(batch_seconds=1.0)
    assert not level.saturated(batch_seconds=8.0)


def test_traffic_is_the_same_for_the_same_number_and_mixes_as_often_as_asked() -> None:
    traffic = Traffic([[1], [2]], new_tokens=4, mixed=0.5, max_batch=2)
    requests = [traffic.request(number, 0.0)[1] for number in range(400)]
    assert requests == [traffic.request(number, 0.0)[1] for number in range(400)]
    mixed = [request.mix for request in requests if request.mix]
    assert 150 < len(mixed) < 250
    assert {len(mix) for mix in mixed} == {3}
    assert {domain for mix in mixed for domain in mix} == set(Group(8).names)

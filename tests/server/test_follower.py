"""One replica's side of changes, against a list of what it was told."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from superpose_server.cluster.desired import Desired, MixOfDigests, Order
from superpose_server.cluster.follower import Follower, Overruled

EMPTY = MixOfDigests("base", "empty")


def mix_of(digest: str) -> MixOfDigests:
    return MixOfDigests("base", digest)


class Weights:
    """What is folded, and what was prepared for it."""

    def __init__(self) -> None:
        self.prepared: list[str] = []
        self.folded: list[str] = []
        self.refuses = ""

    def prepare(self, mix: MixOfDigests) -> str:
        if mix.digest == self.refuses:
            raise ValueError(mix.digest)
        self.prepared.append(mix.digest)
        return mix.digest

    def fold(self, prepared: str) -> None:
        self.folded.append(prepared)


def follower() -> tuple[Follower[str], Weights]:
    weights = Weights()
    return Follower(EMPTY, weights.prepare, weights.fold), weights


def test_what_was_prepared_is_folded_once_when_its_commit_comes() -> None:
    one, weights = follower()
    change = Desired(Order(1, 0), mix_of("a"))

    assert one.prepare(change) == "a"
    assert weights.folded == []
    one.reach(change)
    one.reach(change)  # Doubled.

    assert (weights.prepared, weights.folded, one.held) == (["a"], ["a"], change)


def test_a_commit_alone_is_enough() -> None:
    one, weights = follower()
    one.reach(Desired(Order(1, 7), mix_of("a")))
    assert weights.folded == ["a"]


def test_what_was_prepared_for_another_mix_is_not_folded() -> None:
    one, weights = follower()
    one.prepare(Desired(Order(1, 0), mix_of("a")))
    one.reach(Desired(Order(1, 0), mix_of("b")))
    assert weights.folded == ["b"]


def test_the_same_mix_under_a_later_order_is_not_folded_again() -> None:
    one, weights = follower()
    one.reach(Desired(Order(1, 3), mix_of("a")))
    one.reach(Desired(Order(2, 3), mix_of("a")))
    assert weights.folded == ["a"]
    assert one.held.order == Order(2, 3)


def test_a_later_change_is_kept_and_an_older_one_not_prepared() -> None:
    one, weights = follower()
    newer = Desired(Order(2, 0), mix_of("b"))
    one.reach(newer)
    older = Desired(Order(1, 99), mix_of("a"))

    one.reach(older)
    with pytest.raises(Overruled) as refused:
        one.prepare(older)

    assert one.held == newer
    assert refused.value.held == newer.order
    assert weights.prepared == ["b"]


def test_two_mixes_of_one_order_are_never_both_held() -> None:
    one, _ = follower()
    one.reach(Desired(Order(1, 1), mix_of("a")))
    with pytest.raises(Overruled):
        one.reach(Desired(Order(1, 1), mix_of("b")))
    assert one.held.mix.digest == "a"


def test_what_cannot_be_prepared_leaves_what_is_held() -> None:
    one, weights = follower()
    first = Desired(Order(1, 0), mix_of("a"))
    one.reach(first)
    weights.refuses = "b"
    with pytest.raises(ValueError, match="b"):
        one.reach(Desired(Order(1, 1), mix_of("b")))
    assert one.held == first
    assert weights.folded == ["a"]


orders = st.builds(Order, st.integers(1, 3), st.integers(0, 4))


@given(st.lists(st.tuples(st.booleans(), orders)))
def test_whatever_comes_in_whatever_order_the_latest_is_held(
    messages: list[tuple[bool, Order]],
) -> None:
    """Of one order there is one mix, as a leader sees to; some are prepared, some are committed."""
    one, weights = follower()
    committed: list[Order] = []
    for commits, order in messages:
        desired = Desired(order, mix_of(f"{order.term}.{order.generation}"))
        if commits:
            one.reach(desired)
            committed.append(order)
        elif committed and order < max(committed):
            with pytest.raises(Overruled):
                one.prepare(desired)
        else:
            one.prepare(desired)
        latest = max(committed, default=Order())
        assert one.held.order == latest
        if committed:
            assert weights.folded[-1] == f"{latest.term}.{latest.generation}"

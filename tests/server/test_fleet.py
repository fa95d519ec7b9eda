"""Changes over many replicas: messages are lost, late and doubled, replicas and servers die."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from tests.integration.harness import PATIENCE, LoopThread

from superpose_adapters.adapter import Adapter
from superpose_adapters.base.facts import BaseFacts
from superpose_adapters.bundled import resolve_base
from superpose_adapters.mix import BoundEntry, BoundMix
from superpose_server.cluster.answer import Answer
from superpose_server.cluster.desired import Desired, MixOfDigests, Order
from superpose_server.cluster.fleet import Fleet
from superpose_server.cluster.follower import Follower, Overruled
from superpose_server.cluster.replica import Readiness, RemoteRow, RemoteVerification
from superpose_server.engine.executor import Condition, ServedBase
from superpose_server.engine.job import JobResult
from superpose_server.engine.sampling import SamplingParams
from superpose_server.engine.sequence import Chunk, FinishReason
from superpose_server.engine.sequence import Sequence as Row
from superpose_server.engine.tokenizer import Tokenizer
from superpose_server.errors import (
    AdapterAway,
    FailedPrecondition,
    Internal,
    QueueFull,
    ReplicaUnfit,
    ServerError,
    ShuttingDown,
    Unavailable,
)
from superpose_server.weights.resident import Findings

BASE = "b" * 64
SERVED = ServedBase(
    BASE, {}, BaseFacts("tiny", Path("elsewhere"), "", {}, {}), 7, 7, "float32", "cpu", 64, 4
)
TOKENIZER = Tokenizer(resolve_base("mini"))
EMPTY = MixOfDigests.of(BoundMix(BASE))
FATES = ("arrives", "arrives", "arrives", "lost", "unanswered", "late", "twice")


def mix_of(name: str, weight: float = 1.0) -> BoundMix:
    return BoundMix.of(BASE, [BoundEntry(name, Adapter(name * 64, {}), weight)])


class Member:
    """A replica whose weights are a digest."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.refuses: ServerError | None = None
        self.damaged = False
        self.served = SERVED
        self.resident = EMPTY.digest
        self.follower: Follower[str] = Follower(EMPTY, self._prepare, self._fold)

    def _prepare(self, mix: MixOfDigests) -> str:
        if self.refuses is not None:
            raise self.refuses
        return mix.digest

    def _fold(self, prepared: str) -> None:
        self.resident = prepared

    def answer(self, method: str, *arguments: Any) -> Answer[Any]:
        try:
            return Answer(self.name, getattr(self, method)(*arguments))
        except ServerError as error:
            return Answer(self.name, error=error, unfit=isinstance(error, ReplicaUnfit))

    def term(self) -> int:
        return self.follower.held.order.term

    def base(self) -> ServedBase:
        return self.served

    def prepare(self, desired: Desired) -> Readiness:
        try:
            self.follower.prepare(desired)
        except Overruled as error:
            return Readiness(error.held)
        return Readiness(self.follower.held.order, 0.0)

    def commit(self, desired: Desired) -> Order:
        self.follower.reach(desired)
        return self.follower.held.order

    def condition(self) -> Condition:
        held = self.follower.held
        generation, digest = held.order.generation, held.mix.digest
        return Condition(self.name, "n", generation, digest, 0, 0, 0, intact=True)

    def verify(self, desired: Desired) -> JobResult[RemoteVerification]:
        self.follower.reach(desired)
        bits = f"{self.damaged} {self.resident}"
        found = RemoteVerification(self.resident, f"hash of {bits}", Findings())
        return JobResult(found, 0.0, 0.0)


class Network:
    """Carries calls to members, or not; see `Replicas`."""

    def __init__(self, loop: asyncio.AbstractEventLoop, *members: Member) -> None:
        self.loop = loop
        self.members = list(members)
        self.fates: Iterator[str] = iter(())
        self.late: list[tuple[Member, str, tuple[Any, ...]]] = []
        self.chunks: list[Answer[Chunk]] = []
        self.hangs = False
        self.fails: Exception | None = None
        self.closed: list[str] = []

    async def all(self, method: str, *arguments: Any, patience: float) -> list[Answer[Any]]:
        if self.fails is not None:
            raise self.fails
        answers = []
        for member in tuple(self.members):
            fate = next(self.fates, "arrives")
            if fate == "late":
                self.late.append((member, method, arguments))
            if fate in ("lost", "late"):
                continue
            answer = member.answer(method, *arguments)
            if fate == "twice":
                answer = member.answer(method, *arguments)
            if answer.unfit:
                self.members.remove(member)  # As Ray Serve does a moment later.
            if fate != "unanswered":
                answers.append(answer)
        return answers

    async def one(self, method: str, *arguments: Any) -> Any:
        return self.members[0].answer(method, *arguments)

    async def stream(self, method: str, *arguments: Any) -> AsyncGenerator[Answer[Any]]:
        try:
            if self.fails is not None:
                raise self.fails
            for chunk in self.chunks:
                yield chunk
            if self.hangs:
                await asyncio.Event().wait()
        finally:
            self.closed.append(method)

    def close(self) -> None:
        self.members.clear()


@pytest.fixture(scope="module")
def loop() -> Iterator[LoopThread]:
    thread = LoopThread()
    yield thread
    thread.close()


LOOP = LoopThread()


class Changes(RuleBasedStateMachine):
    """A server, its journal, and replicas that come and go."""

    def __init__(self) -> None:
        super().__init__()
        self.network = Network(LOOP.loop, Member("0"))
        self.named = 1
        self.journal = (0, BoundMix(BASE))
        self.acknowledged: dict[int, str] = {}
        self.held: dict[Order, str] = {}
        self.last: dict[str, Order] = {}
        self.lead()

    def lead(self) -> None:
        """Start a server on what the journal has, as `Runtime` does, until one finds replicas."""
        generation, mix = self.journal
        while True:
            try:
                self.fleet = Fleet(self.network)
                self.fleet.begin(mix, generation)
            except Unavailable:
                self.join()
            else:
                return

    @rule(name=st.sampled_from("pqr"), weight=st.sampled_from([0.5, 1.0]), fates=st.data())
    def change(self, name: str, weight: float, fates: st.DataObject) -> None:
        self.go(mix_of(name, weight), fates, "never")

    @rule(
        name=st.sampled_from("pqr"),
        fates=st.data(),
        dies=st.sampled_from(["prepared", "journalled", "committed"]),
    )
    def change_and_die(self, name: str, fates: st.DataObject, dies: str) -> None:
        self.go(mix_of(name), fates, dies)
        self.network.fates = iter(())
        self.lead()

    def go(self, mix: BoundMix, fates: st.DataObject, dies: str) -> None:
        """Do as `DefaultMix.change` does, up to where the server dies."""
        each = st.lists(st.sampled_from(FATES), max_size=8)
        self.network.fates = iter(fates.draw(each))
        try:
            prepared = self.fleet.prepare(mix)
        except Unavailable:
            return
        if dies == "prepared":
            return
        self.journal = (self.journal[0] + 1, mix)
        if dies == "journalled":
            return
        self.fleet.commit(prepared, self.journal[0]).result(PATIENCE)
        if dies == "committed":
            return
        generation = self.journal[0]
        assert self.acknowledged.setdefault(generation, mix.digest) == mix.digest

    @rule()
    def join(self) -> None:
        self.network.members.append(Member(str(self.named)))
        self.named += 1

    @precondition(lambda self: len(self.network.members) > 1)
    @rule(data=st.data())
    def kill(self, data: st.DataObject) -> None:
        self.network.members.remove(data.draw(st.sampled_from(self.network.members)))

    @precondition(lambda self: len(self.network.members) > 1)
    @rule(data=st.data())
    def spoil(self, data: st.DataObject) -> None:
        member = data.draw(st.sampled_from(self.network.members))
        member.refuses = ReplicaUnfit("its copy of an adapter is damaged")

    @precondition(lambda self: self.network.late)
    @rule(data=st.data())
    def deliver(self, data: st.DataObject) -> None:
        message = data.draw(st.sampled_from(self.network.late))
        self.network.late.remove(message)
        member, method, arguments = message
        member.answer(method, *arguments)

    @precondition(lambda self: self.network.members)
    @rule()
    def verify(self) -> None:
        """Every replica that answers holds what was acknowledged last."""
        self.network.fates = iter(())
        for member in self.network.members:
            member.refuses = None
        found = self.fleet.verify().result(PATIENCE).value
        assert found.ok
        assert found.mix == self.journal[1] == self.fleet.resident
        for member in self.network.members:
            assert member.resident == self.journal[1].digest

    @invariant()
    def of_one_order_there_is_one_mix(self) -> None:
        for member in self.network.members:
            order, digest = member.follower.held.order, member.follower.held.mix.digest
            assert self.held.setdefault(order, digest) == digest
            assert order >= self.last.get(member.name, Order())
            self.last[member.name] = order
            assert member.resident == digest
            if order.generation in self.acknowledged:
                assert self.acknowledged[order.generation] == digest


TestChanges = Changes.TestCase
TestChanges.settings = settings(max_examples=150, stateful_step_count=30, deadline=None)


def led(loop: LoopThread, *members: Member) -> tuple[Fleet, Network]:
    network = Network(loop.loop, *members)
    return Fleet(network), network


def test_without_replicas_there_is_no_fleet(loop: LoopThread) -> None:
    with pytest.raises(Unavailable):
        led(loop)


def test_what_every_replica_refuses_is_refused_and_none_is_taken_out(loop: LoopThread) -> None:
    members = Member("0"), Member("1")
    fleet, network = led(loop, *members)
    for member in members:
        member.refuses = FailedPrecondition("not finite", "FOLD_NOT_FINITE")
    with pytest.raises(FailedPrecondition, match="not finite"):
        fleet.prepare(mix_of("p"))
    assert network.members == [*members]


def test_a_replica_that_cannot_follow_does_not_keep_the_others_from_a_change(
    loop: LoopThread,
) -> None:
    bad, good = Member("0"), Member("1")
    fleet, network = led(loop, bad, good)
    bad.refuses = ReplicaUnfit("its copy is damaged")
    fleet.commit(fleet.prepare(mix_of("p")), 1).result(PATIENCE)
    assert network.members == [good]
    assert good.resident == mix_of("p").digest


def test_a_server_that_is_not_the_last_one_gives_up(loop: LoopThread) -> None:
    member = Member("0")
    first, network = led(loop, member)
    second = Fleet(network)
    second.commit(second.prepare(mix_of("q")), 5).result(PATIENCE)
    third = Fleet(network)
    third.commit(third.prepare(mix_of("q")), 5).result(PATIENCE)

    with pytest.raises(FailedPrecondition) as refused:
        second.prepare(mix_of("p"))

    assert refused.value.reason == "NOT_LEADING"
    assert second.integrity.hopeless
    assert member.resident == mix_of("q").digest
    assert first.integrity.hopeless == ""


def test_hashes_that_differ_are_damage(loop: LoopThread) -> None:
    one, other = Member("0"), Member("1")
    fleet, _ = led(loop, one, other)
    fleet.commit(fleet.prepare(mix_of("p")), 1).result(PATIENCE)
    assert fleet.verify().result(PATIENCE).value.ok
    other.damaged = True
    found = fleet.verify().result(PATIENCE).value
    assert not found.ok
    assert [said.split(":")[0] for said in found.findings.damaged_resident] == ["1"]


def test_hashes_of_different_mixes_are_no_damage(loop: LoopThread) -> None:
    one, other = Member("0"), Member("1")
    fleet, _ = led(loop, one, other)
    fleet.commit(fleet.prepare(mix_of("p")), 1).result(PATIENCE)
    other.resident = EMPTY.digest  # As --residency auto may have it.
    with pytest.raises(FailedPrecondition) as refused:
        fleet.verify().result(PATIENCE)
    assert refused.value.reason == "MIX_KEEPS_CHANGING"


def test_a_look_shows_who_is_behind_and_tells_it_to_go_on(loop: LoopThread) -> None:
    fleet, network = led(loop, Member("0"))
    fleet.begin(BoundMix(BASE), 5)
    late = Member("1")  # It has the mix already, as that is the base, but not the generation.
    network.members.append(late)
    assert [each.generation for each in loop.run(fleet.conditions())] == [5, -1]
    fleet.drain(PATIENCE)
    assert late.follower.held.order.generation == 5


def test_rows_are_as_long_as_the_replica_with_least_memory_holds(loop: LoopThread) -> None:
    small = Member("1")
    small.served = replace(SERVED, context_length=32, max_batch=2)
    fleet, _ = led(loop, Member("0"), small)
    base = fleet.base(Path("here"))
    assert (base.context_length, base.max_batch, base.facts.folder) == (32, 2, Path("here"))


def test_one_replica_that_cannot_does_not_refuse_for_all(loop: LoopThread) -> None:
    one, other = Member("0"), Member("1")
    fleet, network = led(loop, one, other)
    one.refuses = AdapterAway("the store is away")
    fleet.commit(fleet.prepare(mix_of("p")), 1).result(PATIENCE)
    assert other.resident == mix_of("p").digest
    one.refuses = None
    assert fleet.verify().result(PATIENCE).value.ok
    assert (one.resident, network.members) == (mix_of("p").digest, [one, other])


def test_what_no_replica_can_do_is_refused(loop: LoopThread) -> None:
    one, other = Member("0"), Member("1")
    fleet, network = led(loop, one, other)
    one.refuses = other.refuses = AdapterAway("the store is away")
    with pytest.raises(AdapterAway):
        fleet.prepare(mix_of("p"))
    assert network.members == [one, other]


def test_a_commit_that_fails_in_any_way_stands(loop: LoopThread) -> None:
    member = Member("0")
    fleet, network = led(loop, member)
    prepared = fleet.prepare(mix_of("p"))
    network.fails = RuntimeError("no connection")
    fleet.commit(prepared, 1).result(PATIENCE)
    network.fails = None
    assert fleet.verify().result(PATIENCE).value.ok
    assert member.resident == mix_of("p").digest


class Sink(list[Chunk]):
    """Chunks of a row, and when the last is there."""

    def __init__(self) -> None:
        super().__init__()
        self.ended = asyncio.Event()

    def put(self, chunk: Chunk) -> None:
        self.append(chunk)
        if chunk.last:
            self.ended.set()


def row(sink: Sink) -> Row:
    return Row([1, 2], mix_of("p"), SamplingParams(max_new_tokens=3), sink.put, TOKENIZER)


LAST = Answer("0", Chunk("b", (4,), finish_reason=FinishReason.LENGTH))


def test_a_row_gets_what_its_replica_makes(loop: LoopThread) -> None:
    fleet, network = led(loop, Member("0"))
    network.chunks = [Answer("0", Chunk("a", (3,))), LAST]

    async def go() -> Sink:
        sink = Sink()
        fleet.submit(row(sink))
        await sink.ended.wait()
        return sink

    assert [chunk.text for chunk in loop.run(go())] == ["a", "b"]
    assert network.closed == ["generate"]


@pytest.mark.parametrize(
    ("chunks", "kind"),
    [
        ([Answer("0", error=ReplicaUnfit("why"))], ReplicaUnfit),
        ([Answer("0", Chunk("a", (3,)))], Unavailable),  # And then nothing more.
    ],
)
def test_a_row_is_told_how_its_replica_failed(
    loop: LoopThread, chunks: list[Answer[Chunk]], kind: type[ServerError]
) -> None:
    fleet, network = led(loop, Member("0"))
    network.chunks = chunks

    async def go() -> Sink:
        sink = Sink()
        fleet.submit(row(sink))
        await sink.ended.wait()
        return sink

    assert isinstance(loop.run(go())[-1].error, kind)


@pytest.mark.parametrize("error", [QueueFull(3, 1.0), RuntimeError("what nobody foresaw")])
def test_a_row_that_no_replica_takes_is_told(loop: LoopThread, error: Exception) -> None:
    fleet, network = led(loop, Member("0"))
    network.fails = error

    async def go() -> Sink:
        sink = Sink()
        fleet.submit(row(sink))
        await sink.ended.wait()
        return sink

    [chunk] = loop.run(go())
    assert chunk.error is error or isinstance(chunk.error, Internal)


def test_the_end_waits_for_scores_too(loop: LoopThread) -> None:
    fleet, network = led(loop, Member("0"))
    begun, go_on = asyncio.Event(), asyncio.Event()

    async def one(method: str, *arguments: Any) -> Any:
        begun.set()
        await go_on.wait()
        return Answer("0", method)

    network.one = one  # type: ignore[method-assign]
    score = fleet.score([], [])
    loop.run(begun.wait())
    with ThreadPoolExecutor(1) as thread:
        drained = thread.submit(fleet.drain, PATIENCE)
        assert not score.done()
        loop.loop.call_soon_threadsafe(go_on.set)
        drained.result(PATIENCE)
    assert str(score.result()) == "score"


def test_a_row_that_is_cancelled_ends_at_its_replica_too(loop: LoopThread) -> None:
    fleet, network = led(loop, Member("0"))
    network.chunks, network.hangs = [Answer("0", Chunk("a", (3,)))], True

    async def go() -> None:
        sink = Sink()
        one = row(sink)
        fleet.submit(one)
        while not sink:
            await asyncio.sleep(0)
        one.cancel()
        while fleet.running:
            await asyncio.sleep(0)

    loop.run(go())
    assert network.closed == ["generate"]


def test_the_end_aborts_rows_after_the_grace_and_takes_no_more(loop: LoopThread) -> None:
    fleet, network = led(loop, Member("0"))
    network.hangs = True

    async def begin() -> Sink:
        sink = Sink()
        fleet.submit(row(sink))
        await asyncio.sleep(0)
        return sink

    sink = loop.run(begin())
    fleet.drain(0.0)

    async def more() -> None:
        fleet.submit(row(Sink()))

    with pytest.raises(ShuttingDown):
        loop.run(more())
    assert [chunk.finish_reason for chunk in sink] == [FinishReason.ABORTED]
    assert fleet.running == 0


def test_what_goes_to_a_replica_holds_digests_and_no_tensors() -> None:
    sent = RemoteRow([1], MixOfDigests.of(mix_of("p", 0.5)), SamplingParams())
    assert [(e.domain, e.digest, e.weight) for e in sent.mix.entries] == [("p", "p" * 64, 0.5)]
    assert sent.mix.digest == mix_of("p", 0.5).digest

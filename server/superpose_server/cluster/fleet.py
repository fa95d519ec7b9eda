"""The replicas of one server, as its control and its doors see them: one executor.

What names mean is known here alone, so that every text is of one meaning whichever replica runs it;
and each call takes along what the default mix is, which the replica holds before it answers. A
change is prepared by all replicas, made durable by who asked for it (`DefaultMix`), and committed
by all. One that cannot follow is taken out by Ray Serve, and its successor catches up at its first
call. So Ray has to keep nothing of ours: which replicas there are, and that they are well.
"""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Coroutine, Iterable, Sequence
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

from prometheus_client import CollectorRegistry

from superpose_adapters.adapter import Adapter
from superpose_adapters.geometry import Analysis
from superpose_adapters.mix import BoundMix
from superpose_server.cluster.answer import Answer, told
from superpose_server.cluster.desired import Desired, MixOfDigests, Order
from superpose_server.cluster.fleet_metrics import fleet_registry
from superpose_server.cluster.replica import Readiness, RemoteRow, RemoteVerification
from superpose_server.cluster.replicas import Replicas
from superpose_server.control.integrity import Integrity
from superpose_server.engine.executor import Condition, ServedBase
from superpose_server.engine.job import JobResult
from superpose_server.engine.score import RowScore, ScoreRow
from superpose_server.engine.sequence import Chunk
from superpose_server.engine.sequence import Sequence as Row
from superpose_server.errors import (
    FailedPrecondition,
    ShuttingDown,
    Unavailable,
)
from superpose_server.weights.resident import Findings, PreparedMix, Verification

T = TypeVar("T")
# Seconds for what every replica is asked: to read an adapter, to fold; and for how it is.
_PATIENCE = 60.0
_A_LOOK = 5.0
_A_LONG_LOOK = 3600.0  # Of all the weights, in slices between steps.
_ATTEMPTS = 3  # At a verification under one mix.
_log = logging.getLogger(__name__)


class _Whole:
    """The weights of replicas, each of which looks after its own."""

    intact = True


class Fleet:
    """An `Executor` over replicas. Its asynchronous parts run on the loop that it was made on."""

    def __init__(self, replicas: Replicas) -> None:
        """Lead `replicas`, whose former leader, if there was one, is gone.

        Args:
            replicas: The calls.

        Raises:
            Unavailable: No replica answers.
        """
        self._replicas = replicas
        terms = [answer.get() for answer in self._ask_all("term")]
        if not terms:
            raise _nobody()
        # Greater than that of any server before this one, so that its changes are the later ones.
        self._term = 1 + max(terms)
        self._base = _common([answer.get() for answer in self._ask_all("base")])
        self._desired = Desired(Order(self._term, -1), MixOfDigests.of(BoundMix(self._base.digest)))
        self._mix = self._resident = BoundMix(self._base.digest)
        self._rows: set[asyncio.Task[None]] = set()
        self._calls: set[Future[Any]] = set()
        self._ending = False
        self._idle = threading.Condition()
        self.integrity = Integrity(_Whole())

    def base(self, folder: Path) -> ServedBase:
        """Return what is served, its checkpoint being in `folder` here."""
        return replace(self._base, facts=replace(self._base.facts, folder=folder))

    # The operator's, who waits.

    def _ask_all(self, method: str, *arguments: Any) -> list[Answer[Any]]:
        return self._wait(self._replicas.all(method, *arguments, patience=_PATIENCE))

    def _wait(self, call: Coroutine[Any, Any, T]) -> T:
        """Wait for a call that the event loop makes, on any other thread."""
        return asyncio.run_coroutine_threadsafe(call, self._replicas.loop).result()

    def begin(self, mix: BoundMix, generation: int) -> None:
        """Have every replica hold the mix of a start, as a change of this server's.

        Raises:
            FailedPrecondition, Unavailable: As `prepare`.
        """
        self.commit(self.prepare(mix), generation).result()

    def keep(self, adapter: Adapter) -> None:
        """Have every replica read an adapter from the store; who cannot tries again when it must.

        Raises:
            Unavailable: No replica can.
        """
        self._fit(self._ask_all("keep", adapter.digest))

    def prepare(self, mix: BoundMix) -> PreparedMix:
        """Have every replica prepare a mix as the next change.

        Raises:
            FailedPrecondition: The folded weights would not be finite.
            Unavailable: No replica can be asked.
        """
        order = Order(self._term, self._desired.order.generation + 1)
        found = self._fit(self._ask_all("prepare", Desired(order, MixOfDigests.of(mix))))
        ready: list[Readiness] = found
        self._check_leading(each.held for each in ready)
        errors = [each.fold_error for each in ready if each.fold_error is not None]
        if not errors:
            raise _nobody()
        return PreparedMix(mix, fold_error=max(errors))

    def commit(self, prepared: PreparedMix, generation: int) -> Future[BoundMix]:
        """Have every replica make a change that is durable already; so this does not fail.

        A replica that does not answer is behind, and every later call to it takes the change along.
        """
        desired = Desired(Order(self._term, generation), MixOfDigests.of(prepared.mix))
        self._desired, self._mix = desired, prepared.mix
        self._resident = prepared.mix if prepared.foldable else BoundMix(prepared.mix.base_digest)
        done: Future[BoundMix] = Future()
        try:
            answers = self._ask_all("commit", desired)
        except Exception as error:  # It is durable: whatever happened, it stands.
            _log.warning("generation %d: not every replica has answered: %s", generation, error)
        else:
            behind = [answer.replica for answer in answers if answer.error is not None]
            if behind:
                _log.warning("generation %d is not held by %s", generation, ", ".join(behind))
        done.set_result(self._resident)
        return done

    def analyze(self, prepared: PreparedMix) -> Analysis:
        """Have one replica return the geometry of a mix."""
        analysis: Analysis = self._wait(self._one("analyze", MixOfDigests.of(prepared.mix)))
        return analysis

    def _fit(self, answers: Sequence[Answer[T]]) -> list[T]:
        """Return what those answered that could.

        Raises:
            FailedPrecondition: What any of them refuses, since all would.
            ServerError: None could.
        """
        for answer in answers:
            if isinstance(answer.error, FailedPrecondition):
                raise answer.error
        could = [answer for answer in answers if answer.error is None]
        if not could:
            raise next((answer.error for answer in answers if answer.error), _nobody())
        for answer in answers:
            if answer.error is not None:
                _log.warning("replica %s cannot do what others can", answer.replica)
        return [answer.get() for answer in could]

    def _check_leading(self, held: Iterable[Order]) -> None:
        later = [order for order in held if order.term > self._term]
        if later:
            self.integrity.give_up(
                f"its replicas follow a server that was started later (term {later[0].term})"
            )
            raise FailedPrecondition(
                "another server leads these replicas now: ask that one", "NOT_LEADING"
            )

    # On the event loop.

    def submit(self, sequence: Row) -> None:
        """Have a replica run a row.

        Raises:
            ShuttingDown: The server is stopping.
        """
        if self._ending:
            raise ShuttingDown
        task = asyncio.ensure_future(self._run(sequence))
        sequence.on_cancel = task.cancel
        self._rows.add(task)
        task.add_done_callback(self._done)

    def _done(self, task: asyncio.Task[None]) -> None:
        with self._idle:
            self._rows.discard(task)
            self._idle.notify_all()
        if not task.cancelled() and task.exception() is not None:
            _log.error("a row was not told its end", exc_info=task.exception())

    async def _run(self, row: Row) -> None:
        ended = False
        remote = RemoteRow(row.prompt, MixOfDigests.of(row.mix), row.params)
        try:
            async for answer in self._replicas.stream("generate", self._desired, remote):
                chunk = Chunk(error=answer.error) if answer.error else answer.get()
                ended = chunk.last
                row.sink(chunk)
        except asyncio.CancelledError:
            if row.cancelled and not self._ending:
                raise  # Nobody reads on.
            row.sink(row.abort())
        except Exception as error:
            row.sink(Chunk(error=told(error)))
        else:
            if not ended:
                row.sink(Chunk(error=Unavailable("a replica has ended: try again", "REPLICA_LOST")))

    def score(
        self, rows: Sequence[ScoreRow], mixes: Sequence[BoundMix]
    ) -> Future[JobResult[list[RowScore]]]:
        """Have a replica score rows.

        Raises:
            ShuttingDown: The server is stopping.
        """
        known = {mix: MixOfDigests.of(mix) for mix in {*mixes}}
        return self._ask_one("score", self._desired, rows, [known[mix] for mix in mixes])

    def measure_fold_error(self, prepared: PreparedMix) -> Future[JobResult[float]]:
        """Have a replica measure what folding a mix would lose."""
        return self._ask_one("measure_fold_error", MixOfDigests.of(prepared.mix))

    def _ask_one(self, method: str, *arguments: Any) -> Future[Any]:
        return self._later(self._one(method, *arguments))

    async def _one(self, method: str, *arguments: Any) -> Any:
        answer: Answer[Any] = await self._replicas.one(method, *arguments)
        return answer.get()

    def _later(self, call: Any) -> Future[Any]:
        """Begin a call on the event loop; what is returned can be cancelled."""
        if self._ending:
            call.close()
            raise ShuttingDown
        future = asyncio.run_coroutine_threadsafe(call, self._replicas.loop)
        self._calls.add(future)
        future.add_done_callback(self._called)
        return future

    def _called(self, future: Future[Any]) -> None:
        with self._idle:
            self._calls.discard(future)
            self._idle.notify_all()

    def verify(self) -> Future[JobResult[Verification]]:
        """Have every replica verify its weights, and compare their hashes."""
        return self._later(self._verify())

    async def _verify(self) -> JobResult[Verification]:
        """Verify until all replicas have done so under one mix, or a few times.

        Raises:
            FailedPrecondition: They have not: the mix changed again and again, or replicas choose
                for themselves what is resident.
        """
        for _ in range(_ATTEMPTS):
            answers = await self._replicas.all("verify", self._desired, patience=_A_LONG_LOOK)
            results = {answer.replica: answer.get() for answer in answers if not answer.unfit}
            if not results:
                raise _nobody()
            if len({result.value.digest for result in results.values()}) == 1:
                return self._compared(results)
        raise FailedPrecondition(
            "the replicas were verified under different mixes each time: verify again when the mix "
            "rests; with --residency auto each has its own",
            "MIX_KEEPS_CHANGING",
        )

    def _compared(
        self, results: dict[str, JobResult[RemoteVerification]]
    ) -> JobResult[Verification]:
        """Return one result for all replicas; of another hash than the first's is damaged."""
        first = next(iter(results.values())).value
        resident, base, adapters, lost = [], [], [], []
        for replica, result in results.items():
            found = result.value.findings
            resident += [f"{replica}: {name}" for name in found.damaged_resident]
            base += [f"{replica}: {name}" for name in found.damaged_base]
            adapters += [f"{replica}: {name}" for name in found.damaged_adapters]
            lost += [f"{replica}: {name}" for name in found.lost]
            if result.value.hash != first.hash:
                resident.append(
                    f"{replica}: hash {result.value.hash[:12]}, where others have {first.hash[:12]}"
                )
        empty = BoundMix(self._base.digest)
        mix = empty if first.digest == empty.digest else self._mix
        findings = Findings(tuple(resident), tuple(base), tuple(adapters), tuple(lost))
        return JobResult(
            Verification(mix, first.hash, findings),
            max(result.longest_stall_seconds for result in results.values()),
            max(result.seconds for result in results.values()),
        )

    async def conditions(self) -> list[Condition]:
        """Return how every replica is that answers; those that are behind are told to go on."""
        try:
            answers = await self._replicas.all("condition", patience=_A_LOOK)
        except Unavailable:
            return []
        found = [answer.get() for answer in answers if answer.error is None]
        # The generation too: a new replica holds the mix of a base that has none, and no order.
        held = {(each.generation, each.digest) for each in found}
        wanted = (self._desired.order.generation, self._desired.mix.digest)
        if held - {wanted} and not self._ending:
            self._later(self._replicas.all("commit", self._desired, patience=_PATIENCE))
        return sorted(found, key=lambda each: each.replica)

    def scraped(self, own: CollectorRegistry) -> CollectorRegistry:
        """Return what is scraped: of `own` what replicas do not count, and their metrics."""
        return fleet_registry(own, lambda: self._wait(self._metrics()))

    async def _metrics(self) -> dict[str, str]:
        try:
            answers = await self._replicas.all("metrics", patience=_A_LOOK)
        except Unavailable:
            return {}
        return {answer.replica: answer.get() for answer in answers}

    @property
    def running(self) -> int:
        """Number of rows that replicas were given and have not ended."""
        return len(self._rows)

    @property
    def waiting(self) -> int:
        """None wait here: replicas have queues of their own."""
        return 0

    @property
    def resident(self) -> BoundMix:
        """The mix in the weights of every replica."""
        return self._resident

    def drain(self, grace: float) -> None:
        """Take no more rows, and wait at most `grace` seconds for the rest; then abort them."""
        self._ending = True
        with self._idle:
            if not self._idle.wait_for(self._ended, timeout=grace):
                _log.warning("grace is over rows=%d calls=%d", len(self._rows), len(self._calls))
                self._replicas.loop.call_soon_threadsafe(self._abort)
                self._idle.wait_for(self._ended, timeout=_A_LOOK)

    def _ended(self) -> bool:
        return not self._rows and not self._calls

    def _abort(self) -> None:
        for task in tuple(self._rows):
            task.cancel()
        for call in tuple(self._calls):
            call.cancel()

    def stop(self) -> None:
        """End the replicas."""
        self._ending = True
        self._replicas.close()


def _common(bases: Sequence[ServedBase]) -> ServedBase:
    """Return what all replicas serve: rows are as long as the one with least memory holds.

    Raises:
        Unavailable: There is none.
    """
    if not bases:
        raise _nobody()
    return replace(
        bases[0],
        context_length=min(base.context_length for base in bases),
        max_batch=min(base.max_batch for base in bases),
    )


def _nobody() -> Unavailable:
    return Unavailable("no replica answers: try again in a moment", "NO_REPLICA")

"""The engine: one thread that owns model, weights and cache.

A step folds if asked to, takes new rows, runs some tokens of their prompts and one of every other
running row, hands out the tokens that follow, and does one slice of any long job. Prompts and jobs
get a bounded number of tokens a step, so that running streams never wait for more than that.

Other threads only put things into its queues. One thing is done beside it:
`ResidentWeights.prepare` reads modules that were never folded, on the thread that asks for folds.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Generator
from collections.abc import Sequence as SequenceOf
from concurrent.futures import Future
from contextlib import ExitStack
from itertools import accumulate
from typing import Any, TypeVar, TypeVarTuple

import torch
from torch import Tensor

from superpose_adapters.adapter import Adapter
from superpose_adapters.geometry import Analysis
from superpose_adapters.mix import BoundMix
from superpose_server.engine.choosing import choose
from superpose_server.engine.job import Job, JobResult
from superpose_server.engine.logprobs import find_logprobs
from superpose_server.engine.observer import EngineObserver
from superpose_server.engine.residency import Residency
from superpose_server.engine.runner import Runner
from superpose_server.engine.scheduler import RETRY_AFTER_SECONDS, Scheduled, Scheduler
from superpose_server.engine.score import RowScore, ScoreRow, score_slices
from superpose_server.engine.sequence import Chunk, Sequence
from superpose_server.errors import (
    DataLoss,
    FailedPrecondition,
    OutputNotFinite,
    QueueFull,
    ShuttingDown,
)
from superpose_server.model.model import Model
from superpose_server.model.threads import compute_with
from superpose_server.weights.resident import (
    Findings,
    PreparedMix,
    ResidentWeights,
    Verification,
)

Part = SequenceOf[Scheduled]
T = TypeVar("T")
Ts = TypeVarTuple("Ts")
_log = logging.getLogger(__name__)


class Engine:
    """Runs rows under their mixes, and folds, scores and verifies between their steps.

    Attributes:
        runner: What it runs them with.
    """

    def __init__(
        self,
        model: Model,
        weights: ResidentWeights,
        scheduler: Scheduler,
        observer: EngineObserver | None = None,
        *,
        prefill_tokens: int = 128,
        residency: Residency | None = None,
    ) -> None:
        """Take over `model` and `weights`; `start` sets the thread going.

        Args:
            model: The model, with a slot for every row that `scheduler` may run.
            weights: Its parameters.
            scheduler: Who runs.
            observer: Is told what happens.
            prefill_tokens: Prompt tokens, and scored tokens, of one step at most.
            residency: Decides what else to fold than what `fold` is asked for; None: nothing.
        """
        self._threads = torch.get_num_threads()
        self._prefill_tokens = prefill_tokens
        self._residency = residency
        self._model = model
        self._weights = weights
        self._scheduler = scheduler
        self._observer = observer or EngineObserver()
        self.runner = Runner(model, weights)
        self._folds: deque[tuple[PreparedMix, Future[BoundMix]]] = deque()
        self._jobs: deque[Job[Any]] = deque()
        self._wake = threading.Condition()
        self._stopping = False
        self._aborting = False
        self._thread = threading.Thread(target=self._loop, name="engine", daemon=True)

    # Called from any thread.

    def start(self) -> None:
        """Set the engine thread going."""
        self._thread.start()

    def begin(self, mix: BoundMix, generation: int) -> None:
        """Fold the mix of a start, which comes before that of the thread; it is no event."""
        self._weights.fold(self._weights.prepare(mix))

    def keep(self, adapter: Adapter) -> None:
        """Keep the base of what `adapter` adapts; see `ResidentWeights.keep_base`."""
        self._weights.keep_base(adapter)

    def prepare(self, mix: BoundMix) -> PreparedMix:
        """Make what a fold of `mix` needs; see `ResidentWeights.prepare`."""
        return self._weights.prepare(mix)

    def analyze(self, prepared: PreparedMix) -> Analysis:
        """Return the geometry of a mix; see `ResidentWeights.analyze`."""
        return self._weights.analyze(prepared)

    def commit(self, prepared: PreparedMix, generation: int) -> Future[BoundMix]:
        """Fold what was prepared; here no other engine needs to know of which generation it is."""
        return self.fold(prepared)

    def submit(self, sequence: Sequence) -> None:
        """Queue a row; its sink gets chunks on the engine thread.

        Raises:
            QueueFull: Too many rows wait.
            ShuttingDown: The engine takes no more rows.
        """
        with self._wake:
            self._scheduler.submit(sequence)
            self._wake.notify()

    def fold(self, target: PreparedMix) -> Future[BoundMix]:
        """Make `target` resident at the next step boundary; returns what is resident then."""
        future: Future[BoundMix] = Future()
        with self._wake:
            if self._stopping:
                raise ShuttingDown
            self._folds.append((target, future))
            self._wake.notify()
        return future

    def score(
        self, rows: SequenceOf[ScoreRow], mixes: SequenceOf[BoundMix]
    ) -> Future[JobResult[list[RowScore]]]:
        """Return the log-probability of each scored token of each row under the mix in its place.

        Raises:
            QueueFull: Too many jobs wait.
            ShuttingDown: The engine takes no more.
        """
        return self._run(score_slices(self.runner, rows, mixes, self._prefill_tokens))

    def verify(self) -> Future[JobResult[Verification]]:
        """Compare the weights with a fresh fold, and what they are made of with its hashes.

        From the first damage on rows and scores end with a DataLoss, since what they have read was
        damaged, until a check finds nothing.

        Raises:
            QueueFull: Too many jobs wait.
            ShuttingDown: The engine takes no more.
        """
        slices = self._telling(self.runner.verify(), lambda found: found.findings)
        return self._run(slices, needs_weights=False)

    def check(self) -> Future[JobResult[Findings]]:
        """The same, without a hash of all weights, and however the mix changes meanwhile."""
        return self._look_after(self.runner.check())

    def mend(self) -> Future[JobResult[Findings]]:
        """Write the weights anew from the kept base and the adapters, and check them."""
        return self._look_after(self.runner.mend())

    def _look_after(self, look: Generator[bool, None, Findings]) -> Future[JobResult[Findings]]:
        slices = self._telling(look, lambda found: found)
        return self._run(slices, needs_weights=False, bounded=False)

    def _telling(
        self, look: Generator[bool, None, T], findings_of: Callable[[T], Findings]
    ) -> Generator[bool, None, T]:
        """Do what `look` does, and tell what it has found."""
        try:
            found = yield from look
        except BaseException:  # It was cut short, by a fault or from outside.
            if not self._weights.intact:
                self._observe(self._observer.weights_lost)  # Or nobody would mend them.
            raise
        self._observe(self._observer.checked, findings_of(found))
        return found

    def measure_fold_error(self, prepared: PreparedMix) -> Future[JobResult[float]]:
        """Measure what folding `prepared` would lose, without folding it."""
        return self._run(self._weights.measure_fold_error(prepared))

    def _run(
        self, slices: Generator[bool, None, T], *, needs_weights: bool = True, bounded: bool = True
    ) -> Future[JobResult[T]]:
        job = Job(slices, needs_weights=needs_weights)
        with self._wake:
            if self._stopping:
                raise ShuttingDown
            if bounded and len(self._jobs) > self._scheduler.max_queue:
                raise QueueFull(len(self._jobs), RETRY_AFTER_SECONDS)
            self._jobs.append(job)
            self._wake.notify()
        return job.future

    @property
    def running(self) -> int:
        """Number of rows that run."""
        return len(self._scheduler.running)

    @property
    def waiting(self) -> int:
        """Number of rows that wait."""
        return self._scheduler.waiting

    @property
    def resident(self) -> BoundMix:
        """The mix in the weights."""
        return self._weights.resident.mix

    def drain(self, grace: float) -> None:
        """Take no more rows, and wait at most `grace` seconds for the rest; then abort them."""
        self._scheduler.close()
        with self._wake:
            if not self._wake.wait_for(self._ended, timeout=grace):
                _log.warning("grace is over rows=%d waiting=%d", self.running, self.waiting)
                self._aborting = True
                self._wake.notify_all()
                self._wake.wait_for(self._ended)  # A step may be long, but it ends.

    def stop(self) -> None:
        """End the thread after its current step: rows are aborted, jobs fail with ShuttingDown."""
        self._scheduler.close()
        with self._wake:
            self._stopping = True
            self._wake.notify_all()
        if self._thread.is_alive():
            self._thread.join()

    # The engine thread.

    def _idle(self) -> bool:
        return self._scheduler.idle and not self._jobs and not self._folds

    def _ended(self) -> bool:
        """Return whether nothing is left that anybody will end."""
        return self._stopping or self._idle()

    def _loop(self) -> None:
        compute_with(self._threads)
        why: Exception = ShuttingDown()
        try:
            self._step_until_stopped()
        except BaseException as error:
            # No `Exception`, or the fault of a fault's handling: nobody will step any more.
            _log.critical("the engine's thread has died", exc_info=error)
            self._observe(self._observer.died)
            why = RuntimeError("the engine's thread has died")
        finally:
            self._scheduler.close()
            with self._wake:
                self._stopping = True
                try:
                    self._end_all(why)
                except Exception:  # Of which those who could be told were told.
                    _log.critical("not all that ran could be ended", exc_info=True)
                finally:
                    self._wake.notify_all()

    def _step_until_stopped(self) -> None:
        while True:
            with self._wake:
                self._wake.notify_all()
                self._wake.wait_for(lambda: self._stopping or not self._idle())
                if self._stopping:
                    return
            try:
                self.step()
            except Exception as error:
                # Each phase handles what it can blame on a row or a job; what is left is a
                # fault of ours, and nobody may wait in vain because of it.
                _log.exception("engine step failed")
                self._end_all(error)

    def step(self) -> None:
        """Do one step."""
        self._fold()
        if self._aborting:
            self._end_all(ShuttingDown())
        self._drop_cancelled()
        self._admit()
        if not self._weights.intact:
            self._end_rows(_damaged())
        self._run_rows(self._scheduler.schedule(self._prefill_tokens))
        self._do_slice()

    def _fold(self) -> None:
        while self._folds:
            target, future = self._folds.popleft()
            error = self._fold_now(target)
            if error is None:
                future.set_result(self.resident)
            else:
                future.set_exception(error)
            if isinstance(error, DataLoss):
                self._end_all(error)

    def _fold_now(self, target: PreparedMix) -> Exception | None:
        """Fold; return what went wrong. After a DataLoss nothing may run on."""
        started = time.perf_counter()
        error: Exception | None = None
        try:
            self._weights.fold(target)
        except Exception as caught:
            error = caught
        seconds = time.perf_counter() - started
        if self._residency is not None:
            self._residency.folded(seconds)
        self._forget()
        self._observe(self._observer.folded, seconds, error is None, self.resident)
        if isinstance(error, DataLoss):
            self._observe(self._observer.weights_lost)
        _log.info(
            "fold mix=%s resident=%s ms=%.2f ok=%s",
            target.mix.digest[:12],
            self.resident.digest[:12],
            seconds * 1e3,
            error is None,
        )
        return error

    def _drop_cancelled(self) -> None:
        for row in self._scheduler.drop_waiting(cancelled_only=True):
            self._end(row, row.abort())
        for row in [row for row in self._scheduler.running if row.cancelled]:
            if not row.decoding:
                # No logits have told whether what it has written is finite.
                self._model.cache.distrust(self._scheduler.running.index(row))
            self._end(row, row.abort())

    def _admit(self) -> None:
        while (row := self._scheduler.admit()) is not None:
            row.started = time.monotonic()
            self._model.cache.claim(len(self._scheduler.running) - 1)

    def _run_rows(self, scheduled: SequenceOf[Scheduled]) -> None:
        """Run what is scheduled and hand out the tokens that follow; what fails ends alone."""
        if not scheduled:
            return
        started = time.perf_counter()
        decoding = [item.row for item in scheduled if item.row.decoding]
        mixes = [row.mix for row in decoding]
        corrected = self.runner.corrected(mixes)
        done, failed = self._pass(scheduled)
        for part, _ in done:
            for item in part:
                item.ran()
        # First those that failed: what a row leaves in its slot must not be moved as if it were
        # good.
        for part, error in failed:
            self._fail([item.row for item in part], error)
        decoded = tuple(row for row in decoding if not row.ended)
        if decoded:
            self._observe(self._observer.stepped, decoded, self.waiting, corrected)
        for part, logits in done:
            self._hand_out([item.row for item in part if item.chooses], logits)
        if self._residency is not None and decoded:
            if not failed:  # What was repeated tells nothing of what a step costs.
                seconds = time.perf_counter() - started
                prompts = sum(len(item.span.ids) for item in scheduled) - len(decoding)
                self._residency.cost.observe(len(decoding), corrected, seconds, prompts)
            self._follow(self._residency, mixes)

    def _pass(
        self, scheduled: SequenceOf[Scheduled]
    ) -> tuple[list[tuple[Part, Tensor]], list[tuple[Part, Exception]]]:
        """Run what is scheduled at once or, if that fails, in parts: decoding rows, each prompt.

        Returns:
            What ran, with the logits of the rows that get a token, and what failed, with why.
        """
        try:
            return [(scheduled, self._logits(scheduled))], []
        except Exception as error:
            decoding = [item for item in scheduled if item.row.decoding]
            prompts = [[item] for item in scheduled if not item.row.decoding]
            parts = [decoding, *prompts] if decoding else prompts
            _log.exception("pass failed rows=%d parts=%d", len(scheduled), len(parts))
            if len(parts) == 1:
                return [], [(scheduled, error)]
        done: list[tuple[Part, Tensor]] = []
        failed: list[tuple[Part, Exception]] = []
        for part in parts:
            try:
                # A copy, since the next part may be written over it.
                done.append((part, self._logits(part).clone()))
            except Exception as error:
                _log.exception("part of a pass failed rows=%d", len(part))
                failed.append((part, error))
        return done, failed

    def _logits(self, scheduled: SequenceOf[Scheduled]) -> Tensor:
        ends = accumulate(len(item.span.ids) for item in scheduled)
        return self.runner.run(
            [item.span for item in scheduled],
            [end - 1 for item, end in zip(scheduled, ends, strict=True) if item.chooses],
            [item.row.mix for item in scheduled],
        )

    def _follow(self, residency: Residency, mixes: SequenceOf[BoundMix]) -> None:
        """Fold what the rows share, if the policy says so."""
        target = residency.choose(mixes, self.resident)
        if target is None:
            return
        started = time.perf_counter()
        try:
            # Their adapters are registered, so that no base is read that is not kept yet.
            prepared = self._weights.prepare(target)
        except FailedPrecondition as reason:  # The rows themselves are corrected and go on.
            _log.info("mix %s stays corrected: %s", target.digest[:12], reason)
            residency.refuse(target)
            return
        error = self._fold_now(prepared) if prepared.foldable else None
        residency.folded(time.perf_counter() - started)
        if isinstance(error, DataLoss):
            self._end_all(error)
        elif error is not None or not prepared.foldable:
            residency.refuse(target)

    @torch.inference_mode()
    def _hand_out(self, rows: SequenceOf[Sequence], logits: Tensor) -> None:
        """Choose a token for each row from logits (rows, vocabulary) and give it to its client."""
        if not rows:
            return
        try:
            params = [row.params for row in rows]
            tokens, finite = choose(
                logits,
                params,
                [row.generator for row in rows],
                [row.forbidden for row in rows],
                [row.history for row in rows],
            )
            logprobs = find_logprobs(params, logits, tokens)
        except Exception as error:
            _log.exception("choosing tokens failed rows=%d", len(rows))
            self._fail(rows, error)
            return
        broken = [row for row, fine in zip(rows, finite, strict=True) if not fine]
        if broken:
            # Before any row leaves and another is moved into its place.
            self._fail(broken, OutputNotFinite())
        for row, token, of_token in zip(rows, tokens, logprobs, strict=True):
            if row.ended:
                continue
            try:
                chunk = row.append(token, of_token)
            except Exception as error:
                _log.exception("row failed")
                self._fail((row,), error)
                continue
            self._give(row, chunk)

    def _give(self, row: Sequence, chunk: Chunk) -> None:
        if len(row.tokens) == 1:
            row.first_token = time.monotonic()
            self._observe(self._observer.prefilled, row)
        if chunk.last:
            self._end(row, chunk)
        else:
            self._tell(row, chunk)

    def _fail(self, rows: SequenceOf[Sequence], error: Exception) -> None:
        """End those of `rows` that go on still with an error; what they wrote is not trusted."""
        failed = [row for row in rows if not row.ended]
        for row in failed:
            row.ended = True
            self._model.cache.distrust(self._scheduler.running.index(row))
        try:
            for row in failed:
                self._release(row)
        finally:
            for row in failed:
                self._tell(row, Chunk(error=error))

    def _end(self, row: Sequence, chunk: Chunk) -> None:
        """Give a row's slot to others, and then, whatever happens, its last chunk to its client."""
        try:
            if row in self._scheduler.running:
                self._release(row)
        finally:
            self._tell(row, chunk)

    def _tell(self, row: Sequence, chunk: Chunk) -> None:
        """Hand a chunk to the client; the last one before anything else, which might fail."""
        row.ended = chunk.last
        try:
            row.sink(chunk)
        except Exception:  # The client's loop is gone; other rows have nothing to do with it.
            _log.exception("sink failed")
            row.cancelled = True
        if chunk.error is not None:
            self._observe(self._observer.failed, row, chunk.error)
        elif chunk.finish_reason is not None:
            self._observe(self._observer.finished, row, chunk.finish_reason)

    def _observe(self, event: Callable[[*Ts], None], *arguments: *Ts) -> None:
        try:
            event(*arguments)
        except Exception:  # Nobody's text depends on who looks on.
            _log.exception("observer failed")

    def _release(self, row: Sequence) -> None:
        slot = self._scheduler.running.index(row)
        moved = self._scheduler.release(slot)
        if moved is not None:
            other = self._scheduler.running[slot]
            self._model.cache.move(moved, slot, other.computed)
            if not other.decoding:
                # No logits have told whether what it left behind is finite.
                self._model.cache.distrust(moved)
        self._forget()

    def _forget(self) -> None:
        """Let go of adapters that nobody needs any more."""
        self.runner.forget([row.mix for row in self._scheduler.running])

    def _do_slice(self) -> None:
        if self._jobs:
            # It stays in the queue meanwhile, so that the engine is not taken for idle.
            job = self._jobs[0]
            if job.needs_weights and not self._weights.intact:
                self._jobs.popleft().fail(_damaged())
            elif not job.run_slice():
                self._jobs.popleft()
                self._forget()
            elif job.yields:
                self._jobs.rotate(-1)  # Behind the others, so that jobs take turns.

    def _end_all(self, error: Exception) -> None:
        """End every row, job and fold, with no work on the device, which may be what failed.

        What raises keeps nobody else from an end; it is raised when all have theirs.
        """
        with ExitStack() as ends:  # The last first.
            ends.callback(self.runner.forget)
            while self._folds:
                ends.callback(self._folds.popleft()[1].set_exception, error)
            while self._jobs:
                ends.callback(self._jobs.popleft().fail, error)
            ends.callback(self._end_rows, error)

    def _end_rows(self, error: Exception) -> None:
        """End every row, those that wait too."""
        stopping = isinstance(error, ShuttingDown)
        for row in self._scheduler.drop_waiting(cancelled_only=False):
            self._tell(row, Chunk(error=error))
        for slot in range(self._model.scratch_slot + 1):
            # Where a pass broke off, nobody knows what it has written.
            self._model.cache.distrust(slot)
        for row in self._scheduler.drop_running():
            if not row.ended:
                self._tell(row, row.abort() if stopping else Chunk(error=error))


def _damaged() -> DataLoss:
    return DataLoss(
        "the weights were found damaged, and what was made of them may be wrong: try again in a "
        "moment, when they are mended",
        "WEIGHTS_DAMAGED",
    )

"""The engine: one thread that owns model, weights and cache.

A step folds if asked to, takes new rows, runs some tokens of their prompts, decodes one token for
every other running row, hands the tokens out, and does one slice of any long job. Prompts and jobs
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
from itertools import accumulate
from typing import Any, TypeVar, TypeVarTuple

import torch
from torch import Tensor

from superpose_adapters.mix import BoundMix
from superpose_server.engine.job import Job, JobResult
from superpose_server.engine.observer import EngineObserver
from superpose_server.engine.residency import Residency
from superpose_server.engine.sampling import sample
from superpose_server.engine.scheduler import RETRY_AFTER_SECONDS, Scheduler
from superpose_server.engine.score import ScoreRow, score_slices
from superpose_server.engine.sequence import Chunk, Sequence
from superpose_server.errors import DataLoss, FailedPrecondition, QueueFull, ShuttingDown
from superpose_server.model.batch import Span
from superpose_server.model.model import Model
from superpose_server.model.threads import compute_with
from superpose_server.weights.corrections import Corrections
from superpose_server.weights.resident import PreparedMix, ResidentWeights, Verification

T = TypeVar("T")
Ts = TypeVarTuple("Ts")
_log = logging.getLogger(__name__)


class Engine:
    """Runs rows under their mixes, and folds, scores and verifies between their steps."""

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
        self._corrections = Corrections(
            {name: model.module.get_submodule(name) for name in model.layout},
            model.device,
            heads=[name for name, shape in model.layout.items() if shape.head],
            kernels=model.packed,
        )
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

    def score(self, rows: list[ScoreRow], mix: BoundMix) -> Future[JobResult[list[list[float]]]]:
        """Return the log-probability of each scored token of each row under `mix`."""
        return self._run(
            score_slices(
                self._model, self._corrections, self._weights, rows, mix, self._prefill_tokens
            )
        )

    def verify(self) -> Future[JobResult[Verification]]:
        """Compare the weights with a fresh fold, and the base with its hash."""
        return self._run(self._weights.verify())

    def measure_fold_error(self, prepared: PreparedMix) -> Future[JobResult[float]]:
        """Measure what folding `prepared` would lose, without folding it."""
        return self._run(self._weights.measure_fold_error(prepared))

    def _run(self, slices: Generator[bool, None, T]) -> Future[JobResult[T]]:
        job = Job(slices)
        with self._wake:
            if self._stopping:
                raise ShuttingDown
            if len(self._jobs) > self._scheduler.max_queue:
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
            if not self._wake.wait_for(self._idle, timeout=grace):
                _log.warning("grace is over rows=%d waiting=%d", self.running, self.waiting)
                self._aborting = True
                self._wake.notify_all()
                # A step may be long, but it ends; only a thread that has died would not.
                self._wake.wait_for(lambda: self._idle() or not self._thread.is_alive())

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

    def _loop(self) -> None:
        compute_with(self._threads)
        try:
            while True:
                with self._wake:
                    self._wake.notify_all()
                    self._wake.wait_for(lambda: self._stopping or not self._idle())
                    if self._stopping:
                        break
                try:
                    self.step()
                except Exception as error:
                    # Each phase handles what it can blame on a row or a job; what is left is a
                    # fault of ours, and nobody may wait in vain because of it.
                    _log.exception("engine step failed")
                    self._end_all(error)
        finally:
            self._scheduler.close()
            with self._wake:
                self._stopping = True
                self._end_all(ShuttingDown())
                self._wake.notify_all()

    def step(self) -> None:
        """Do one step."""
        self._fold()
        if self._aborting:
            self._end_all(ShuttingDown())
        self._drop_cancelled()
        self._prefill()
        self._decode()
        self._do_slice()

    def _fold(self) -> None:
        while self._folds:
            target, future = self._folds.popleft()
            error = self._fold_now(target)
            if error is None:
                future.set_result(self.resident)
            else:
                future.set_exception(error)

    def _fold_now(self, target: PreparedMix) -> Exception | None:
        """Fold; return what went wrong."""
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
                self._model.cache.clear(self._scheduler.running.index(row))
            self._end(row, row.abort())

    def _prefill(self) -> None:
        while self._scheduler.admit() is not None:
            self._scheduler.running[-1].started = time.monotonic()
        left = self._prefill_tokens
        rows: list[Sequence] = []
        spans: list[Span] = []
        slots = {row: slot for slot, row in enumerate(self._scheduler.running) if not row.decoding}
        for row in sorted(slots, key=lambda row: row.started):
            begin = row.prefilled
            ids = row.prompt[begin : begin + left]
            if ids:
                rows.append(row)
                spans.append(Span(slots[row], ids, begin))
                left -= len(ids)
        if not rows:
            return
        try:
            ends = list(accumulate(len(span.ids) for span in spans))
            whole = [i for i, row in enumerate(rows) if spans[i].end == len(row.prompt)]
            logits, _ = self._forward(rows, spans, [ends[i] - 1 for i in whole])
            for row, span in zip(rows, spans, strict=True):
                row.prefilled = span.end
            self._hand_out([rows[i] for i in whole], logits)
        except Exception as error:
            _log.exception("prefill failed rows=%d", len(rows))
            self._fail(rows, error)

    def _decode(self) -> None:
        rows = [row for row in self._scheduler.running if row.decoding]
        if not rows:
            return
        try:
            spans = [
                Span(slot, row.tokens[-1:], row.position)
                for slot, row in enumerate(self._scheduler.running)
                if row.decoding
            ]
            started = time.perf_counter()
            logits, corrected = self._forward(rows, spans, range(len(rows)))
            self._observe(self._observer.stepped, tuple(rows), self.waiting, corrected)
            self._hand_out(rows, logits)
        except Exception as error:
            _log.exception("decode failed rows=%d", len(rows))
            self._fail(rows, error)
            return
        if self._residency is not None:
            self._residency.cost.observe(len(rows), corrected, time.perf_counter() - started)
            self._follow(self._residency, [row.mix for row in rows])

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

    def _forward(
        self, rows: SequenceOf[Sequence], spans: SequenceOf[Span], wanted: SequenceOf[int]
    ) -> tuple[Tensor, int]:
        """Run one span a row under the rows' mixes; return logits and how many were corrected."""
        correction = self._corrections.plan([row.mix for row in rows], self.resident)
        with self._corrections.applied(correction, spans, wanted):
            logits = self._model.run(spans, wanted, hooked=correction is not None)
        return logits, correction.corrected_rows if correction else 0

    @torch.inference_mode()
    def _hand_out(self, rows: SequenceOf[Sequence], logits: Tensor) -> None:
        """Choose a token for each row from logits (rows, vocabulary) and give it to its client."""
        if not rows:
            return
        tokens, finite = sample(
            logits,
            [row.params for row in rows],
            [row.generator for row in rows],
            [row.forbidden for row in rows],
        )
        broken = [row for row, fine in zip(rows, finite, strict=True) if not fine]
        if broken:
            # Before any row leaves and another is moved into its place.
            self._fail(broken, _not_finite())
        logprobs: dict[Sequence, float] = {}
        asking = [i for i, row in enumerate(rows) if row.params.logprobs and not row.ended]
        if asking:
            asked = logits[asking]
            chosen = torch.tensor([tokens[i] for i in asking], device=logits.device)
            values = asked.gather(1, chosen[:, None])[:, 0] - asked.logsumexp(-1)
            logprobs = dict(zip([rows[i] for i in asking], values.tolist(), strict=True))
        for row, token in zip(rows, tokens, strict=True):
            if row.ended:
                continue
            try:
                chunk = row.append(token, logprobs.get(row))
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
        """End those of `rows` that go on still with an error, and wipe their slots."""
        failed = [row for row in rows if not row.ended]
        for row in failed:
            row.ended = True
        try:
            for row in failed:
                # What is masked is multiplied by 0, which does not undo a NaN.
                self._model.cache.clear(self._scheduler.running.index(row))
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
            self._model.cache.move(moved, slot, other.cached)
            if not other.decoding:
                # No logits have told whether what it left behind is finite.
                self._model.cache.clear(moved)
        self._forget()

    def _forget(self) -> None:
        """Let go of adapters that nobody needs any more."""
        self._corrections.forget([row.mix for row in self._scheduler.running])

    def _do_slice(self) -> None:
        if self._jobs:
            # It stays in the queue meanwhile, so that the engine is not taken for idle.
            job = self._jobs[0]
            if not job.run_slice():
                self._jobs.popleft()
                self._forget()
            elif job.yields:
                self._jobs.rotate(-1)  # Behind the others, so that jobs take turns.

    def _end_all(self, error: Exception) -> None:
        """End every row, job and fold, with no work on the device, which may be what failed."""
        stopping = isinstance(error, ShuttingDown)
        for row in self._scheduler.drop_waiting(cancelled_only=False):
            self._tell(row, Chunk(error=error))
        for row in self._scheduler.drop_running():
            if not row.ended:
                self._tell(row, row.abort() if stopping else Chunk(error=error))
        while self._jobs:
            self._jobs.popleft().fail(error)
        while self._folds:
            self._folds.popleft()[1].set_exception(error)
        self._corrections.forget()


def _not_finite() -> FailedPrecondition:
    return FailedPrecondition(
        "the model's output is not finite under this mix: use smaller weights", "OUTPUT_NOT_FINITE"
    )

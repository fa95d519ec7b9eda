"""Long work on the engine thread, done in slices so that running rows go on in between."""

from __future__ import annotations

import time
from collections.abc import Generator
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Generic, TypeVar

T = TypeVar("T")


@dataclass(frozen=True)
class JobResult(Generic[T]):
    """What a job returned, and for how long it kept the engine busy.

    Attributes:
        value: What it returned.
        longest_stall_seconds: Its longest slice.
        seconds: All of its slices together.
    """

    value: T
    longest_stall_seconds: float
    seconds: float


class Job(Generic[T]):
    """A generator that yields after each slice and returns its result.

    It yields True where another job may run next, False where it must itself go on first.

    Attributes:
        yields: What it yielded last.
        needs_weights: Whether damaged weights would spoil its result.
    """

    def __init__(self, slices: Generator[bool, None, T], *, needs_weights: bool = True) -> None:
        """Wrap `slices`, which runs on the engine thread alone."""
        self._slices = slices
        self.needs_weights = needs_weights
        self._longest = self._seconds = 0.0
        self.yields = True
        self.future: Future[JobResult[T]] = Future()

    def run_slice(self) -> bool:
        """Run the next slice; return True while there is more to do."""
        if self.future.cancelled():
            self._slices.close()
            return False
        started = time.perf_counter()
        try:
            self.yields = next(self._slices)
        except StopIteration as end:
            self._measure(started)
            self._resolve(JobResult(end.value, self._longest, self._seconds), None)
            return False
        except Exception as error:
            self._resolve(None, error)
            return False
        self._measure(started)
        return True

    def fail(self, error: Exception) -> None:
        """End the job before its time; who waits for it is told, even if it cannot be cut short."""
        try:
            self._slices.close()
        finally:
            self._resolve(None, error)

    def _measure(self, started: float) -> None:
        took = time.perf_counter() - started
        self._longest = max(self._longest, took)
        self._seconds += took

    def _resolve(self, result: JobResult[T] | None, error: Exception | None) -> None:
        # The caller may have cancelled in the meantime; then nobody waits for the result.
        if not self.future.set_running_or_notify_cancel():
            return
        if error is not None:
            self.future.set_exception(error)
        elif result is not None:
            self.future.set_result(result)

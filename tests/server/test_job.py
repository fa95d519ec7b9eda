from __future__ import annotations

from collections.abc import Generator

import pytest

from superpose_server.engine.job import Job


class Slices:
    """A generator of three slices, and what became of it; it must go on after the second."""

    def __init__(self, error: Exception | None = None) -> None:
        self.error = error
        self.ran = 0
        self.closed = False

    def __call__(self) -> Generator[bool, None, str]:
        try:
            for _ in range(3):
                self.ran += 1
                if self.error is not None and self.ran == 2:
                    raise self.error
                yield self.ran != 2
            return "done"
        finally:
            self.closed = True


def test_a_job_runs_slice_by_slice_and_returns_its_result() -> None:
    slices = Slices()
    job = Job(slices())
    assert slices.ran == 0  # nothing runs on the thread that asks
    assert [job.run_slice() for _ in range(3)] == [True, True, True]
    assert not job.future.done()
    assert not job.run_slice()
    assert job.future.result(timeout=0).value == "done"


def test_a_job_tells_where_another_may_run_next() -> None:
    job = Job(Slices()())
    assert job.yields  # it has not begun
    told = []
    while job.run_slice():
        told.append(job.yields)
    assert told == [True, False, True]


def test_a_job_that_raises_tells_its_error() -> None:
    job = Job(Slices(KeyError("lost"))())
    assert job.run_slice()
    assert not job.run_slice()
    with pytest.raises(KeyError, match="lost"):
        job.future.result(timeout=0)


def test_a_cancelled_job_runs_no_more_and_cleans_up() -> None:
    slices = Slices()
    job = Job(slices())
    job.run_slice()
    assert job.future.cancel()
    assert not job.run_slice()
    assert slices.ran == 1
    assert slices.closed


def test_a_job_that_is_failed_from_outside_cleans_up() -> None:
    slices = Slices()
    job = Job(slices())
    job.run_slice()
    job.fail(ValueError("the end"))
    assert slices.closed
    with pytest.raises(ValueError, match="the end"):
        job.future.result(timeout=0)


def test_failing_a_cancelled_job_is_no_error() -> None:
    job = Job(Slices()())
    job.future.cancel()
    job.fail(ValueError("the end"))
    assert job.future.cancelled()


def test_a_result_that_comes_after_a_cancel_is_dropped() -> None:
    job: Job[int]

    def slices() -> Generator[bool, None, int]:
        yield True
        job.future.cancel()  # the caller goes away during the last slice
        return 1

    job = Job(slices())
    assert job.run_slice()
    assert not job.run_slice()
    assert job.future.cancelled()


def test_the_longest_slice_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([0.0, 1.0, 10.0, 13.0, 20.0, 22.0, 30.0, 30.5])
    monkeypatch.setattr("superpose_server.engine.job.time.perf_counter", lambda: next(clock))
    job = Job(Slices()())
    while job.run_slice():
        pass
    assert job.future.result(timeout=0).longest_stall_seconds == 3.0


def test_who_waits_for_a_job_is_told_even_if_it_cannot_be_cut_short() -> None:
    def slices() -> Generator[bool, None, None]:
        try:
            yield True
        finally:
            raise KeyError("lost")

    job = Job(slices())
    job.run_slice()
    with pytest.raises(KeyError, match="lost"):
        job.fail(ValueError("the end"))
    with pytest.raises(ValueError, match="the end"):
        job.future.result(timeout=0)

"""The guard's thread and the engine's, which hold locks of their own; test_guard of integration."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import CancelledError, Future
from typing import Any

import pytest

from superpose_server.control.guard import Guard
from superpose_server.control.integrity import Integrity

Asked = Callable[[], Future[Any]]


class Engine:
    """In the place of the engine: does what it is told when it is asked for a check."""

    def __init__(self, asked: Asked) -> None:
        self.check = self.mend = asked


class Weights:
    intact = True


def guard(asked: Asked) -> tuple[Guard, Integrity]:
    integrity = Integrity(Weights())
    engine: Any = Engine(asked)
    return Guard(engine, integrity, 3600), integrity


def test_the_engine_may_find_damage_while_it_is_asked_for_a_check() -> None:
    """It tells so under a lock of its own, which the guard must not want while it has its own."""
    told = threading.Event()

    def asked() -> Future[Any]:
        def tell() -> None:
            integrity.weights_lost()
            told.set()

        threading.Thread(target=tell, daemon=True).start()
        assert told.wait(30)  # As where the engine's thread has the lock that this call needs.
        done: Future[Any] = Future()
        done.cancel()
        return done

    guarding, integrity = guard(asked)
    with pytest.raises(CancelledError):
        guarding._look_after()


def test_a_check_that_is_asked_for_while_the_guard_ends_is_cancelled() -> None:
    jobs: list[Future[Any]] = []

    def asked() -> Future[Any]:
        guarding.stop()
        jobs.append(Future())
        return jobs[0]

    guarding, _ = guard(asked)
    with pytest.raises(CancelledError):
        guarding._look_after()
    assert jobs[0].cancelled()

"""The guard: checks the weights now and then, mends what is damaged, and says when nothing can.

Memory loses a bit now and then, and a fault of ours may write where it should not. So the weights
are compared with what they should be while they serve, in slices between steps. From the first
damage on nothing is served; then they are folded anew from the kept base and the adapters, which
have hashes of their own, and checked, and served again. Damage to those is mended by nothing that
is here: the server has to end, and its next start reads them again.
"""

from __future__ import annotations

import logging
import threading
import time
from concurrent.futures import CancelledError, Future

from superpose_server.control.integrity import Integrity
from superpose_server.engine.engine import Engine
from superpose_server.engine.job import JobResult
from superpose_server.errors import ShuttingDown
from superpose_server.weights.resident import Findings

# Of the engine's time, where nobody says how often: a quarter of the 1 % of throughput that may be
# lost, since a check also pushes out of the caches what a step would have found there, which costs
# up to three times its own time (benchmarks.guard).
_SHARE = 0.0025
_SHORTEST_SECONDS = 60.0
_log = logging.getLogger(__name__)


def default_interval(cost: float) -> float:
    """Return the seconds from one check to the next, if each takes `cost` of them."""
    return max(_SHORTEST_SECONDS, cost / _SHARE)


class Guard:
    """Looks after the weights of an engine, on a thread of its own."""

    def __init__(self, engine: Engine, integrity: Integrity, every: float | None) -> None:
        """Guard nothing yet; see `start`.

        Args:
            engine: Whose weights.
            integrity: Knows what was found of them, and is told when nothing can be mended.
            every: Seconds from the beginning of one check to that of the next; 0: none, but what
                others find damaged is mended; None: as often as costs little, see `_SHARE`.
        """
        self._engine = engine
        self._integrity = integrity
        self._every = every
        self._changed = threading.Condition()
        self._stopping = False
        self._job: Future[JobResult[Findings]] | None = None
        self._thread = threading.Thread(target=self._run, name="guard", daemon=True)
        integrity.follow(self._wake)

    def start(self) -> None:
        """Set the thread going."""
        self._thread.start()

    def stop(self) -> None:
        """End the thread, and a check that runs."""
        with self._changed:
            self._stopping = True
            self._changed.notify_all()
            if self._job is not None:
                self._job.cancel()
        if self._thread.is_alive():
            self._thread.join()

    def _wake(self, intact: bool) -> None:
        if not intact:
            with self._changed:
                self._changed.notify_all()

    def _run(self) -> None:
        due = self._after(time.monotonic(), 0.0)
        while self._wait_until(due):
            began = time.monotonic()
            try:
                due = self._after(began, self._look_after())
            except (ShuttingDown, CancelledError):
                return

    def _after(self, began: float, cost: float) -> float | None:
        """Return when the next check is due after one that took `cost` seconds; None: never."""
        if self._every == 0:
            return None
        return began + (self._every or default_interval(cost))

    def _wait_until(self, due: float | None) -> bool:
        """Wait until then, or until there is something to mend; False: nothing is to be done."""
        with self._changed:
            self._changed.wait_for(
                lambda: self._stopping or not self._integrity.intact,
                timeout=None if due is None else max(0.0, due - time.monotonic()),
            )
            return not (self._stopping or self._integrity.hopeless)

    def _look_after(self) -> float:
        """Check the weights, or mend them; return what it took of the engine's time, in seconds.

        Raises:
            ShuttingDown, CancelledError: The server ends.
        """
        mends = not self._integrity.intact
        # Not under the lock: the engine has one of its own, under which it may wake this thread.
        job = self._engine.mend() if mends else self._engine.check()
        with self._changed:
            self._job = job
            if self._stopping:
                job.cancel()
        try:
            done = job.result()
        except (ShuttingDown, CancelledError):
            raise
        except Exception:
            _log.exception("the weights could not be %s", "mended" if mends else "checked")
            if mends:
                self._integrity.give_up("the weights are damaged, and could not be folded anew")
            return 0.0
        _log.log(
            logging.WARNING if mends else logging.DEBUG,
            "weights %s ok=%s seconds=%.3f longest_stall_ms=%.1f",
            "mended" if mends else "checked",
            done.value.ok,
            done.seconds,
            done.longest_stall_seconds * 1e3,
        )
        if mends and not done.value.ok:
            self._integrity.give_up("the weights are damaged again after they were folded anew")
        return done.seconds

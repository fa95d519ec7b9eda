"""Following a file: the server goes to what it says, before it is ready and whenever it changes.

What cannot be reached leaves what is served, all of it, and is tried again with every look: a
domain that is not here may be pushed, and a network may come back.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from concurrent.futures import CancelledError
from contextvars import copy_context
from dataclasses import dataclass

from superpose_server.caller import Caller, set_caller
from superpose_server.control.followed_file import FollowedFile
from superpose_server.control.mix_file import MixFile, MixFileError
from superpose_server.errors import ServerError, ShuttingDown, StartupError

CALLER = "follow"
"""Who makes the changes, in the record of them."""
# Reasons of what a push mends, which a server that does not start takes from nobody.
_PUSH_MENDS = {"DOMAIN_NOT_FOUND", "ADAPTER_DIFFERS"}
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Followed:
    """A followed file, as of the last look at it.

    Attributes:
        name: What clients call it; see `FollowedFile.short_name`.
        problem: Why the server is not at what it says, in one line; "" if it is.
    """

    name: str
    problem: str = ""

    @property
    def reached(self) -> bool:
        """True if the server is at what the file says."""
        return not self.problem


class Following:
    """Looks at a file now and then, on a thread of its own.

    Attributes:
        state: What the last look found; any thread may read it.
    """

    def __init__(
        self, file: FollowedFile, every: float, reach: Callable[[MixFile], object]
    ) -> None:
        """Follow nothing yet; see `start`.

        Args:
            file: The file.
            every: Seconds between two looks at it.
            reach: Brings the server to what a file says; a ServerError leaves it as it is.
        """
        self._file = file
        self._every = every
        self._reach = reach
        self._stopping = threading.Event()
        self._looking = threading.Lock()
        self._context = copy_context()
        self._context.run(set_caller, Caller(CALLER, file.name))
        self._thread = threading.Thread(target=self._run, name="follow", daemon=True)
        self.state = Followed(file.short_name, "nobody has looked at it yet")

    def start(self) -> None:
        """Go to what the file says, and set the thread going.

        Raises:
            StartupError: It cannot be reached.
        """
        problem, reason = self._look()
        if problem:
            if reason in _PUSH_MENDS:
                problem += "; start without --follow, push it, and start again"
            raise StartupError(f"--follow {self._file.name}: {problem}")
        self.state = Followed(self._file.short_name)
        self._thread.start()

    def stop(self) -> None:
        """Begin no more changes; `close` waits for one that is under way."""
        self._stopping.set()
        self._file.close()

    def close(self) -> None:
        """End the thread, which must not be waiting for what only comes later."""
        self.stop()
        if self._thread.is_alive():
            self._thread.join()

    def look(self) -> None:
        """Read the file, go to what it says, and tell of it if that begins or ceases to fail."""
        with self._looking:
            (problem, _), before = self._look(), self.state.problem
            if self._stopping.is_set():
                return
            self.state = Followed(self._file.short_name, problem)
        if problem and not before:
            _log.error("not at what %s says, and serving what was: %s", self._file.name, problem)
        elif before and not problem:
            _log.warning("at what %s says again", self._file.name)

    def _run(self) -> None:
        while not self._stopping.wait(self._every):
            self.look()

    def _look(self) -> tuple[str, str]:
        """Return why the server is not at what the file says, and its reason for programs.

        Both are "" if it is; the second one is if there is none.
        """
        try:
            self._context.run(self._read_and_reach)
        except MixFileError as error:
            return str(error), ""
        except (ShuttingDown, CancelledError):
            return "the server is shutting down", ""
        except ServerError as error:
            return error.message, error.reason
        except Exception:
            if not self._stopping.is_set():  # Or its parts end under it.
                _log.exception("a look at %s failed", self._file.name)
            return "internal error: the log says more", ""
        return "", ""

    def _read_and_reach(self) -> None:
        wanted = self._file.read()
        if self._stopping.is_set():
            raise ShuttingDown
        self._reach(wanted)

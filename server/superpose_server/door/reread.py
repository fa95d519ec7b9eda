"""What is read again, while the server runs, when its files change."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Generic, TypeVar

T = TypeVar("T")
# Of a file: when it was written, when its rights changed, its size, and which file it is.
Stamp = tuple[int, int, int, int, int] | None
_log = logging.getLogger(__name__)


class Reread(Generic[T]):
    """What some files hold, asked for at each use: to see whether they changed takes microseconds.

    Files that cannot be read change nothing: what they held before stays, and the log says why,
    once for each change of them.
    """

    def __init__(self, what: str, paths: Sequence[Path], read: Callable[[], T]) -> None:
        """Read them for the first time.

        Args:
            what: What they hold, to people.
            paths: The files.
            read: Returns what they hold; a ValueError says in one line why it does not.

        Raises:
            ValueError: What `read` raises.
        """
        self._what = what
        self._paths = paths
        self._read = read
        self._lock = threading.Lock()
        # Before the reading, so that a change within it is seen at the next look.
        self._stamps = self._look()
        self._held = read()

    def get(self) -> T:
        """Return what the files hold; for any thread."""
        with self._lock:
            stamps = self._look()
            if stamps != self._stamps:
                self._stamps = stamps
                self._read_again()
            return self._held

    def _read_again(self) -> None:
        try:
            self._held = self._read()
        except ValueError as error:
            _log.error("kept the old %s: %s", self._what, error)
        else:
            _log.info("read the %s again", self._what)

    def _look(self) -> tuple[Stamp, ...]:
        return tuple(map(_stamp, self._paths))


def _stamp(path: Path) -> Stamp:
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_mtime_ns, found.st_ctime_ns, found.st_size, found.st_ino, found.st_dev

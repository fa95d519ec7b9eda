"""Every instant at which a process can be killed, as far as a folder of files can tell.

What a killed process leaves is what it has told the system until then. Python says so before each
call that changes files (its audit events), whoever makes it, so that no list of calls has to be
kept here.
"""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# {path below the folder: bytes of a file, or None for a folder}
Tree = dict[str, bytes | None]
# Is told (event, its first argument) before a call that may change files; may raise in its place.
Watcher = Callable[[str, Any], None]

_WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC
_ONLY_READ = {"os.listdir", "os.scandir", "os.walk", "os.fwalk"}
_watcher: Watcher | None = None
_installed = False
_here = threading.local()


def _hook(event: str, arguments: tuple[Any, ...]) -> None:
    if _watcher is None:
        return
    if event == "open":
        changes = isinstance(arguments[2], int) and bool(arguments[2] & _WRITES)
    else:
        changes = event.startswith("os.") and event not in _ONLY_READ
    if changes and not getattr(_here, "watching", False):
        _here.watching = True
        try:
            _watcher(event, arguments[0] if arguments else None)
        finally:
            _here.watching = False


@contextmanager
def watching(watcher: Watcher) -> Iterator[None]:
    """Call `watcher` before every call of this process that may change files."""
    global _watcher, _installed
    if not _installed:  # There is no way to take one off again.
        sys.addaudithook(_hook)
        _installed = True
    _watcher = watcher
    try:
        yield
    finally:
        _watcher = None


def tree(folder: Path) -> Tree:
    """Return everything in a folder."""
    return {
        str(path.relative_to(folder)): None if path.is_dir() else path.read_bytes()
        for path in sorted(folder.rglob("*"))
    }


def plant(state: Tree, folder: Path) -> None:
    """Make `folder` hold `state`."""
    folder.mkdir(parents=True)
    for name, content in state.items():  # Folders come before what is in them.
        if content is None:
            (folder / name).mkdir()
        else:
            (folder / name).write_bytes(content)


@dataclass(frozen=True)
class Instant:
    """What a kill would leave, and what was under way then."""

    under_way: int
    state: Tree


class Instants:
    """Collects what a kill at any instant would leave of a folder.

    Attributes:
        under_way: Number of what is done now, as its user counts.
        found: All of it, in order, each state once in a row.
    """

    def __init__(self, folder: Path) -> None:
        self.under_way = 0
        self.found: list[Instant] = []
        self._folder = folder
        self._opened: str | None = None  # A file that is being written.

    @contextmanager
    def collected(self) -> Iterator[None]:
        """Collect while the block runs; one thread at a time may change the folder."""
        with watching(self._collect):
            yield

    def next(self) -> None:
        """Note that what was under way is done, and something else begins."""
        self._collect("", None)
        self.under_way += 1

    def _collect(self, event: str, subject: Any) -> None:
        state = tree(self._folder)
        opened = self._opened
        if opened is not None and state.get(opened):
            content = state[opened] or b""
            self._add({**state, opened: content[: len(content) // 2]})  # cut short
        self._add(state)
        self._opened = None
        path = Path(os.fsdecode(subject)) if isinstance(subject, str | bytes | Path) else None
        if event == "open" and path is not None and path.is_relative_to(self._folder):
            self._opened = str(path.relative_to(self._folder))

    def _add(self, state: Tree) -> None:
        instant = Instant(self.under_way, state)
        if not self.found or self.found[-1] != instant:
            self.found.append(instant)

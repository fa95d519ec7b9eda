"""The record of changes: who changed what, in the log and in a file of the state folder.

A line is written once the change stands, and before its call returns. If the process is killed in
between it is missing, which shows: the next line's `before` is not what the last one left. Lines
outlast the process; they are not waited for on the disk, as a change already waits for its own.
"""

from __future__ import annotations

import json
import logging
import os
import threading
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path

from superpose_adapters.tokens import format_time
from superpose_server.caller import caller
from superpose_server.control.default_mix import MixState

# Of a file; there are two, the older of which goes when the newer is full.
MOST_BYTES = 8 << 20
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Change:
    """One change.

    Attributes:
        time: When, in UTC.
        who: The token's name, or `anonymous`.
        peer: Where the call came from.
        what: As `adapterctl` would write it.
        generation_before: Of the default mix before the change.
        digest_before: The same.
        generation: After it.
        digest: After it.
    """

    time: str
    who: str
    peer: str
    what: str
    generation_before: int
    digest_before: str
    generation: int
    digest: str


class Audit:
    """The record of one state folder. One thread at a time may add to it, any may read."""

    def __init__(self, folder: Path, most_bytes: int = MOST_BYTES) -> None:
        """Go on with what is in `folder`, which exists."""
        self.path = folder / "audit.jsonl"
        self._older = folder / "audit.jsonl.1"
        self._most_bytes = most_bytes
        self._lock = threading.Lock()

    def note(self, what: str, before: MixState, after: MixState) -> None:
        """Write down that who calls has made a change."""
        calling = caller()
        change = Change(
            format_time(datetime.now(UTC)),
            calling.name,
            calling.peer,
            what,
            before.generation,
            before.mix.digest,
            after.generation,
            after.mix.digest,
        )
        _log.info(
            "change who=%s peer=%s what=%r generation=%d->%d digest=%s",
            *(change.who, change.peer, change.what),
            *(change.generation_before, change.generation, change.digest),
        )
        line = json.dumps(asdict(change)).encode() + b"\n"
        try:
            with self._lock:
                self._append(line)
        except OSError as error:
            # Nothing is taken back for it: the change stands, and the log above has it.
            _log.error(
                "the record of changes %s cannot be written (%s): free space or mend the folder; "
                "until then changes are in this log alone",
                self.path,
                error.strerror or error,
            )

    def _append(self, line: bytes) -> None:
        if self.path.exists() and self.path.stat().st_size + len(line) > self._most_bytes:
            self.path.replace(self._older)
        descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o600)
        with os.fdopen(descriptor, "a+b", buffering=0) as file:
            end = file.seek(0, os.SEEK_END)
            if end:
                file.seek(end - 1)
                if file.read(1) != b"\n":  # A write was cut off, by a full disk or a power cut.
                    file.write(b"\n")
            file.write(line)

    def newest(self, limit: int) -> list[Change]:
        """Return the newest changes, the latest last.

        What is no whole line is left out.

        Raises:
            OSError: The files cannot be read.
        """
        with self._lock:
            lines = [*_lines(self._older), *_lines(self.path)]
        return list(_changes(lines[-limit:]))


def _lines(path: Path) -> list[bytes]:
    return path.read_bytes().splitlines() if path.exists() else []


def _changes(lines: Iterable[bytes]) -> Iterable[Change]:
    for line in lines:
        try:
            yield Change(**json.loads(line))
        except (ValueError, TypeError):
            continue

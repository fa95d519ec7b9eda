"""What a process holds: memory, threads and open files (Linux). What grows for ever shows here."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

MIB = 1 << 20


@dataclass(frozen=True)
class Footprint:
    """Of one process at one moment.

    Attributes:
        rss: Bytes of resident memory.
        threads: Number of its threads.
        files: Number of its open file descriptors, sockets among them.
    """

    rss: int
    threads: int
    files: int

    @classmethod
    def of(cls, pid: int | None = None) -> Footprint:
        """Measure a process; None: this one."""
        folder = Path("/proc") / (str(pid) if pid else "self")
        pages = int((folder / "statm").read_text().split()[1])
        return cls(
            pages * os.sysconf("SC_PAGE_SIZE"),
            len(list((folder / "task").iterdir())),
            len(list((folder / "fd").iterdir())),
        )

    def growth(
        self, later: Footprint, *, mib: float, threads: int = 0, files: int = 0
    ) -> list[str]:
        """Return a line for each thing that grew by more than is allowed from here to `later`."""
        grown = {
            "resident MiB": ((later.rss - self.rss) / MIB, mib),
            "threads": (later.threads - self.threads, threads),
            "open files": (later.files - self.files, files),
        }
        return [
            f"{what} grew by {by:g}, and {most:g} are allowed"
            for what, (by, most) in grown.items()
            if by > most
        ]

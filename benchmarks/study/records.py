"""Finished work, one JSON object a line: what is in the file is done, what is not is to do.

Lines are appended. A kill in the midst of writing leaves a torn last line, which is not a record:
it is passed over, and cut off before the next line is written. Only what turns out to be of another
adapter is taken out again.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from superpose_adapters.durable import write_file

Record = dict[str, Any]


class Records:
    """The records of one kind, by their key; the last one of a key counts."""

    def __init__(self, path: Path) -> None:
        """Read `path`, which may be absent.

        Raises:
            ValueError: A line other than the last is damaged.
        """
        self._path = path
        self._by_key: dict[str, Record] = {}
        self._whole = 0  # bytes of whole lines
        data = path.read_bytes() if path.exists() else b""
        for number, line in enumerate(data.splitlines(keepends=True), start=1):
            if not line.endswith(b"\n"):
                break
            try:
                record = json.loads(line)
                self._by_key[record["key"]] = record
            except (ValueError, TypeError, KeyError) as error:
                raise ValueError(
                    f"{path}:{number}: not a record; delete the line, what it held is done again"
                ) from error
            self._whole += len(line)

    def __contains__(self, key: str) -> bool:
        """Tell whether `key` is done."""
        return key in self._by_key

    def __iter__(self) -> Iterator[Record]:
        """Return the records in the order of their keys' first lines."""
        return iter(self._by_key.values())

    def __len__(self) -> int:
        """Return how many keys are done."""
        return len(self._by_key)

    def get(self, key: str) -> Record | None:
        """Return a record, or None if it is not done."""
        return self._by_key.get(key)

    def add(self, record: Record) -> None:
        """Append a record; it is on the disk when this returns.

        Raises:
            OSError: It could not be written; the file then holds what it held before, or a torn
                last line.
        """
        line = _line(record)
        self._path.parent.mkdir(parents=True, exist_ok=True)
        with self._path.open("ab") as file:
            if file.tell() != self._whole:
                file.truncate(self._whole)
            file.write(line)
            file.flush()
            os.fsync(file.fileno())
        self._whole += len(line)
        self._by_key[record["key"]] = record

    def drop(self, unwanted: Callable[[Record], bool]) -> int:
        """Take records out, and return how many.

        Raises:
            OSError: The file could not be written; it then holds what it held before.
        """
        kept = {key: each for key, each in self._by_key.items() if not unwanted(each)}
        dropped = len(self._by_key) - len(kept)
        if dropped:
            data = b"".join(_line(record) for record in kept.values())
            write_file(self._path, data)
            self._by_key, self._whole = kept, len(data)
        return dropped


def _line(record: Record) -> bytes:
    return json.dumps(record, separators=(",", ":"), allow_nan=False).encode() + b"\n"

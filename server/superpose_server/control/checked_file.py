"""A small JSON file with a checksum: whole, or known not to be."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from superpose_adapters.digest import canonical_digest
from superpose_adapters.durable import RevertibleFile
from superpose_adapters.strict_json import shorten

_FORMAT = 1


class FileDamaged(ValueError):
    """A file cannot be trusted; the message names it and the way out."""


class CheckedFile:
    """One file of the state folder, which holds one JSON value, its body."""

    def __init__(self, path: Path, what: str, without: str) -> None:
        """Use `path`, in a folder that exists and that nobody else writes to.

        Args:
            path: The file.
            what: What the file is, to people.
            without: What a server does that finds no such file.

        Raises:
            OSError: What a write has left that was cut short cannot be removed.
        """
        self.path = path
        self._file = RevertibleFile(path)
        self._what = what
        self._without = without

    def read(self) -> Any | None:
        """Return the body that was written last, or None if none ever was.

        Raises:
            FileDamaged: The file is not whole, or of another format.
        """
        try:
            written = self._file.read()
        except OSError as error:
            raise self.damaged(f"it cannot be read ({error})") from error
        if written is None:
            return None
        try:
            stored = json.loads(written)
            body, checksum, found = stored["body"], stored["checksum"], stored["format"]
            intact = canonical_digest(body) == checksum
        except (ValueError, TypeError, KeyError, RecursionError) as error:
            raise self.damaged(f"it is not a whole {self._what}") from error
        if found != _FORMAT:
            raise self.damaged(f"it has format {shorten(found)}, not {_FORMAT}")
        if not intact:
            raise self.damaged("its checksum does not match")
        if body is None:  # Which would pass for a file that is not there.
            raise self.damaged(f"it is not a whole {self._what}")
        return body

    def damaged(self, why: str) -> FileDamaged:
        """Return the error for a file that cannot be trusted."""
        return FileDamaged(
            f"{self._what} {self.path} is damaged: {why}; restore it from a backup, "
            f"or delete it to {self._without}"
        )

    def write(self, body: Any) -> None:
        """Make `body` durable; on an error the file is as it was.

        Raises:
            OSError: No space, no permission, or a failing disk.
        """
        text = json.dumps(
            {"format": _FORMAT, "body": body, "checksum": canonical_digest(body)}, indent=1
        )
        self._file.write(text.encode())

    def undo(self) -> None:
        """Take the last write back; see `RevertibleFile`."""
        self._file.undo()

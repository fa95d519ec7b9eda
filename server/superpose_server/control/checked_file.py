"""A small JSON file with a checksum: whole, or known not to be.

A write is durable before it returns (temporary file, fsync, rename, fsync of the folder); what was
there before is kept beside it until the next write, so that taking a write back needs no space.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from superpose_adapters.digest import canonical_digest
from superpose_adapters.durable import sync, write_synced

_FORMAT = 1


class FileDamaged(ValueError):
    """A file cannot be trusted; the message names it and the way out."""


class CheckedFile:
    """One file of the state folder, which holds one JSON value, its body."""

    def __init__(self, path: Path, what: str, without: str) -> None:
        """Use `path`, in a folder that exists.

        Args:
            path: The file.
            what: What the file is, to people.
            without: What a server does that finds no such file.
        """
        self.path = path
        self._what = what
        self._without = without
        self._previous = path.with_name(f"{path.name}.previous")
        self._temporary = path.with_name(f"{path.name}.tmp")

    def read(self) -> Any | None:
        """Return the body that was written last, or None if none ever was.

        Raises:
            FileDamaged: The file is not whole, or of another format.
        """
        try:
            text = self.path.read_text()
        except FileNotFoundError:
            return None
        except (OSError, UnicodeDecodeError) as error:
            raise self.damaged(f"it cannot be read ({error})") from error
        try:
            stored = json.loads(text)
            body, checksum, found = stored["body"], stored["checksum"], stored["format"]
            intact = canonical_digest(body) == checksum
        except (ValueError, TypeError, KeyError, RecursionError) as error:
            raise self.damaged(f"it is not a whole {self._what}") from error
        if found != _FORMAT:
            raise self.damaged(f"it has format {found}, not {_FORMAT}")
        if not intact:
            raise self.damaged("its checksum does not match")
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
        try:
            write_synced(self._temporary, text.encode())
            self._previous.unlink(missing_ok=True)
            if self.path.exists():
                os.link(self.path, self._previous)
            self._temporary.replace(self.path)
        except OSError:
            self._temporary.unlink(missing_ok=True)
            raise
        try:
            sync(self.path.parent)
        except OSError:
            self.undo()
            raise

    def undo(self) -> None:
        """Take the last write back."""
        if self._previous.exists():
            self._previous.replace(self.path)
        else:
            self.path.unlink(missing_ok=True)
        sync(self.path.parent)

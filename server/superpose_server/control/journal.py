"""The journal: the default mix on disk, so that it survives a restart.

One small JSON file with a checksum. A write is durable before it returns (temporary file, fsync,
rename, fsync of the folder); what was there before is kept beside it until the next write, so that
taking a write back needs no space.
"""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path

from superpose_adapters.digest import canonical_digest
from superpose_adapters.durable import sync, write_synced

_FORMAT = 1


class JournalDamaged(ValueError):
    """The journal cannot be trusted; the message names the file and the way out."""


@dataclass(frozen=True)
class JournalEntry:
    """One domain of the journalled mix."""

    domain: str
    adapter_digest: str
    weight: float


@dataclass(frozen=True)
class Record:
    """What the journal holds: the default mix, bound."""

    generation: int
    base_digest: str
    mix_digest: str
    entries: tuple[JournalEntry, ...]


class Journal:
    """The journal of one state folder."""

    def __init__(self, folder: Path) -> None:
        """Use `folder`, which exists."""
        self.path = folder / "mix.json"
        self._previous = folder / "mix.json.previous"
        self._temporary = folder / "mix.json.tmp"

    def read(self) -> Record | None:
        """Return what was written last, or None if nothing ever was.

        Raises:
            JournalDamaged: The file is not whole, or of another format.
        """
        try:
            text = self.path.read_text()
        except FileNotFoundError:
            return None
        except (OSError, UnicodeDecodeError) as error:
            raise self._damaged(f"it cannot be read ({error})") from error
        try:
            stored = json.loads(text)
            body, checksum = stored["body"], stored["checksum"]
            if stored["format"] != _FORMAT:
                raise self._damaged(f"it has format {stored['format']}, not {_FORMAT}")
            if canonical_digest(body) != checksum:
                raise self._damaged("its checksum does not match")
            entries = tuple(JournalEntry(**entry) for entry in body.pop("entries"))
            return Record(**body, entries=entries)
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            if isinstance(error, JournalDamaged):
                raise
            raise self._damaged("it is not a whole journal") from error

    def _damaged(self, why: str) -> JournalDamaged:
        return JournalDamaged(
            f"journal {self.path} is damaged: {why}; restore it from a backup, "
            "or delete it to start from the base model"
        )

    def write(self, record: Record) -> None:
        """Make `record` durable; on an error the journal is as it was.

        Raises:
            OSError: No space, no permission, or a failing disk.
        """
        body = asdict(record)
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

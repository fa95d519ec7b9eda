"""The journal: the default mix on disk, so that it survives a restart."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path

from superpose_server.control.checked_file import CheckedFile


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
        self._file = CheckedFile(folder / "mix.json", "journal", "start from the base model")
        self.path = self._file.path

    def read(self) -> Record | None:
        """Return what was written last, or None if nothing ever was.

        Raises:
            FileDamaged: The file is not whole, or of another format.
        """
        body = self._file.read()
        if body is None:
            return None
        try:
            entries = tuple(JournalEntry(**entry) for entry in body.pop("entries"))
            return Record(**body, entries=entries)
        except (TypeError, KeyError, AttributeError) as error:
            raise self._file.damaged("it is not a whole journal") from error

    def write(self, record: Record) -> None:
        """Make `record` durable; on an error the journal is as it was.

        Raises:
            OSError: No space, no permission, or a failing disk.
        """
        self._file.write(asdict(record))

    def undo(self) -> None:
        """Take the last write back."""
        self._file.undo()

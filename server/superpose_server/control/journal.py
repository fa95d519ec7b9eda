"""The journal: the default mix on disk, so that it survives a restart."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path

from superpose_adapters.mix_syntax import check_weight
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


def _check(record: Record) -> None:
    """Refuse what no server has written, whatever its checksum says.

    Raises:
        TypeError, ValueError: A field is of another type, or no generation, or no weight.
    """
    texts = [record.base_digest, record.mix_digest]
    for entry in record.entries:
        check_weight(entry.domain, entry.weight)
        texts += [entry.domain, entry.adapter_digest]
    if type(record.generation) is not int or record.generation < 0:
        raise ValueError("no generation")
    if not all(isinstance(text, str) for text in texts):
        raise TypeError("no text")


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
            record = Record(**body, entries=entries)
            _check(record)
        except (TypeError, KeyError, AttributeError, ValueError) as error:
            raise self._file.damaged("it is not a whole journal") from error
        return record

    def write(self, record: Record) -> None:
        """Make `record` durable; on an error the journal is as it was.

        Raises:
            OSError: No space, no permission, or a failing disk.
        """
        self._file.write(asdict(record))

    def undo(self) -> None:
        """Take the last write back."""
        self._file.undo()

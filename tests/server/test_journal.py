from __future__ import annotations

import errno
import itertools
import json
import os
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from superpose_server.control.checked_file import FileDamaged
from superpose_server.control.journal import Journal, JournalEntry, Record

OLD = Record(7, "b" * 64, "c" * 64, (JournalEntry("math", "d" * 64, -0.75),))
NEW = Record(8, "b" * 64, "e" * 64, ())


@pytest.fixture
def journal(tmp_path: Path) -> Journal:
    return Journal(tmp_path)


def test_nothing_was_ever_written(journal: Journal) -> None:
    assert journal.read() is None


@given(
    generation=st.integers(0, 2**63),
    entries=st.lists(
        st.builds(
            JournalEntry,
            st.text("abc.-_0", min_size=1, max_size=64),
            st.text("0123456789abcdef", min_size=64, max_size=64),
            st.floats(-1e4, 1e4),
        ),
        max_size=4,
    ),
)
def test_a_record_is_read_as_it_was_written(
    tmp_path_factory: pytest.TempPathFactory, generation: int, entries: list[JournalEntry]
) -> None:
    folder = tmp_path_factory.mktemp("journal")
    record = Record(generation, "b" * 64, "c" * 64, tuple(entries))
    Journal(folder).write(record)
    assert Journal(folder).read() == record


def test_undo_brings_the_record_before_back(journal: Journal) -> None:
    journal.write(OLD)
    journal.write(NEW)
    journal.undo()
    assert journal.read() == OLD
    journal.write(NEW)
    journal.write(OLD)
    journal.undo()
    assert journal.read() == NEW


def test_undo_of_the_first_write_leaves_no_journal(journal: Journal) -> None:
    journal.write(OLD)
    journal.undo()
    assert journal.read() is None


def assert_damaged(journal: Journal) -> None:
    with pytest.raises(FileDamaged) as caught:
        journal.read()
    message = str(caught.value)
    assert str(journal.path) in message
    assert "backup" in message
    assert "delete it" in message


def test_a_journal_cut_short_anywhere_is_damaged(journal: Journal) -> None:
    journal.write(OLD)
    whole = journal.path.read_bytes()
    for length in range(len(whole)):
        journal.path.write_bytes(whole[:length])
        assert_damaged(journal)


def test_a_journal_with_a_flipped_bit_anywhere_is_damaged(journal: Journal) -> None:
    journal.write(OLD)
    whole = journal.path.read_bytes()
    for index in range(len(whole)):
        for bit in range(8):
            damaged = bytearray(whole)
            damaged[index] ^= 1 << bit
            journal.path.write_bytes(damaged)
            assert_damaged(journal)


def checked(body: Any, **changes: Any) -> str:
    """A journal of a body that somebody wrote by hand, with the right checksum."""
    from superpose_adapters.digest import canonical_digest

    return json.dumps({"format": 1, "body": body, "checksum": canonical_digest(body)} | changes)


@pytest.mark.parametrize(
    "text",
    [
        "null",
        "[]",
        "[" * 100_000,
        '"text"',
        "{}",
        "\x00" * 40,
        checked({}),
        checked([]),
        checked({"generation": 1, "entries": []}),
        checked({"generation": 1, "entries": [{"domain": "math"}]}),
        checked({"entries": 3}),
        checked({"entries": []}, format=2),
        checked({"entries": []}, checksum="0" * 64),
    ],
)
def test_what_is_no_journal_is_damaged(journal: Journal, text: str) -> None:
    journal.path.write_text(text)
    assert_damaged(journal)


def test_bytes_that_are_no_text_are_damaged(journal: Journal) -> None:
    journal.path.write_bytes(b"\xff\xfe{}")
    assert_damaged(journal)


def test_a_folder_in_the_place_of_the_journal_is_damaged(journal: Journal) -> None:
    journal.path.mkdir()
    assert_damaged(journal)


# A disk that fails.


def no_space(*_: object, **__: object) -> Any:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def fail_fsync_of(kind: Callable[[int], bool], nth: int = 0) -> Callable[[int], None]:
    real = os.fsync
    calls = itertools.count()

    def fsync(descriptor: int) -> None:
        if kind(os.fstat(descriptor).st_mode) and next(calls) == nth:
            no_space()
        real(descriptor)

    return fsync


def fail_write(monkeypatch: pytest.MonkeyPatch) -> None:
    real = Path.open

    def opening(self: Path, mode: str = "r", *args: Any, **kwargs: Any) -> Any:
        file = real(self, mode, *args, **kwargs)
        if "w" in mode:
            file.write(b"half of it")
            file.flush()
            monkeypatch.setattr(file, "write", no_space)
        return file

    monkeypatch.setattr(Path, "open", opening)


FAULTS: dict[str, Callable[[pytest.MonkeyPatch], None]] = {
    "write": fail_write,
    "file_fsync": lambda m: m.setattr(os, "fsync", fail_fsync_of(stat.S_ISREG)),
    "copy": lambda m: m.setattr(os, "fsync", fail_fsync_of(stat.S_ISREG, nth=1)),
    "rename": lambda m: m.setattr(Path, "replace", no_space),
    "folder_fsync": lambda m: m.setattr(os, "fsync", fail_fsync_of(stat.S_ISDIR)),
}


# Nothing is copied at the first write.
@pytest.mark.parametrize(
    ("fault", "before"),
    [(fault, OLD) for fault in FAULTS] + [(fault, None) for fault in FAULTS if fault != "copy"],
)
def test_a_write_that_fails_keeps_the_old_record(
    journal: Journal, monkeypatch: pytest.MonkeyPatch, fault: str, before: Record | None
) -> None:
    if before is not None:
        journal.write(before)
    with monkeypatch.context() as patch:
        FAULTS[fault](patch)
        with pytest.raises(OSError, match="No space left"):
            journal.write(NEW)
    assert journal.read() == before
    assert not list(journal.path.parent.glob("*.tmp"))
    journal.write(NEW)  # when there is space again
    assert journal.read() == NEW
    journal.undo()
    assert journal.read() == before

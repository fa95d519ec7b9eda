"""What is written is there whole and known to be on the disk, or nothing has changed."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path

import pytest
from tests.full_disk import files_of_at_most
from tests.instants import Instants, plant, tree

from superpose_adapters.durable import (
    RevertibleFile,
    naming,
    new_folder,
    replacing,
    write_file,
)

Write = Callable[[Path], None]


def file(path: Path) -> None:
    write_file(path, b"second")


def stream(path: Path) -> None:
    with replacing(path) as fresh, fresh.open("wb") as target:
        target.write(b"sec")
        target.write(b"ond")


def folder(path: Path) -> None:
    with new_folder(path) as fresh:
        (fresh / "deep").mkdir()
        (fresh / "deep" / "a").write_bytes(b"second")


def contents(path: Path) -> dict[str, bytes]:
    """Return every file under a folder."""
    return {
        str(each.relative_to(path)): each.read_bytes() for each in path.rglob("*") if each.is_file()
    }


def test_a_file_takes_the_place_of_another_and_its_folder_is_made(tmp_path: Path) -> None:
    write_file(tmp_path / "some" / "file", b"first")
    file(tmp_path / "some" / "file")
    stream(tmp_path / "other")
    folder(tmp_path / "folder")
    assert contents(tmp_path) == {
        "some/file": b"second",
        "other": b"second",
        "folder/deep/a": b"second",
    }
    assert {each.name for each in tmp_path.iterdir()} == {"some", "other", "folder"}


@pytest.mark.parametrize("write", [file, stream, folder])
def test_all_bytes_are_on_the_disk_before_the_rename_and_the_rename_before_the_return(
    write: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    events: list[str] = []
    fsync, replace, rename = os.fsync, Path.replace, Path.rename

    def synced(descriptor: int) -> None:
        fsync(descriptor)
        events.append(Path(f"/proc/self/fd/{descriptor}").readlink().name)

    def renamed(real: Callable[[Path, Path], Path]) -> Callable[[Path, Path], Path]:
        def rename(self: Path, target: Path) -> Path:
            events.append("rename")
            return real(self, target)

        return rename

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(Path, "replace", renamed(replace))
    monkeypatch.setattr(Path, "rename", renamed(rename))
    write(tmp_path / "it")
    fresh = f".it.{os.getpid()}"
    before = ["a", "deep", fresh] if write is folder else [fresh]
    at = events.index("rename")
    assert sorted(events[:at]) == sorted(before)
    assert events[at:] == ["rename", tmp_path.name]


@pytest.mark.parametrize("write", [file, stream, folder])
def test_a_full_disk_changes_nothing_and_names_what_was_to_be_written(
    write: Write, tmp_path: Path
) -> None:
    if write is not folder:
        write_file(tmp_path / "it", b"first")
    before = contents(tmp_path)
    with files_of_at_most(5), pytest.raises(OSError, match=r"it: cannot be written: File too la"):
        write(tmp_path / "it")
    assert contents(tmp_path) == before
    assert len(list(tmp_path.iterdir())) == len(before)


@pytest.mark.parametrize("write", [file, stream, folder])
def test_bytes_that_do_not_reach_the_disk_take_no_place(
    write: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(_: int) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="it: cannot be written: Input/output error"):
        write(tmp_path / "it")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("write", [file, stream, folder])
def test_a_last_wait_that_fails_leaves_the_whole_of_the_new(
    write: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fsync = os.fsync

    def fail(descriptor: int) -> None:
        if Path(f"/proc/self/fd/{descriptor}").readlink() == tmp_path:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="it: cannot be written: Input/output error"):
        write(tmp_path / "it")
    assert contents(tmp_path) == {"it/deep/a" if write is folder else "it": b"second"}


@pytest.mark.parametrize("write", [file, stream, folder])
def test_an_interruption_leaves_nothing(
    write: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(_: int) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write(tmp_path / "it")
    assert not list(tmp_path.iterdir())


def test_an_error_that_names_its_file_passes_as_it_is(tmp_path: Path) -> None:
    error = FileNotFoundError(errno.ENOENT, "no", "gone")
    with pytest.raises(FileNotFoundError) as caught, naming(tmp_path):
        raise error
    assert caught.value is error


# A file whose last write can be taken back.


@pytest.mark.parametrize("before", [None, b"first"])
def test_a_write_and_its_taking_back_are_whole_at_any_instant(
    tmp_path: Path, before: bytes | None
) -> None:
    def change(file: RevertibleFile) -> None:
        file.write(b"second")

    def undo(file: RevertibleFile) -> None:
        file.write(b"second")
        file.undo()

    for number, action in enumerate((change, undo), start=1):
        folder = tmp_path / str(number)
        folder.mkdir()
        file = RevertibleFile(folder / "it")
        if before is not None:
            file.write(b"zeroth")
            file.write(before)
        instants = Instants(folder)
        with instants.collected():
            action(file)
            instants.next()
        for at, instant in enumerate(instants.found):
            left = folder / f"left-{at}"
            plant(instant.state, left)
            again = RevertibleFile(left / "it")
            assert again.read() in (before, b"second")
            assert set(tree(left)) <= {"it", "it.previous"}
            again.write(b"third")
            again.undo()
            assert again.read() == (instant.state.get("it"))
    assert file.read() == before
    # Cut short in the new file, in the copy of the old one, before and after the rename.
    assert len(instants.found) >= (4 if before is None else 6)

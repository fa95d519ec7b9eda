"""Files and folders that are there whole or not at all, whatever instant the machine stops at.

What is new is written beside its place, waited for until it is on the disk, and takes the place by
one rename, which is waited for too. Only if that last wait fails is the new thing there and yet an
error raised: whole, but nobody knows whether it outlasts the machine.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def sync(path: Path) -> None:
    """Wait until a file's bytes, or a folder's entries, are on the disk.

    Windows opens no folder: there its entries are not waited for, so that after a power cut what
    was there before may be back, whole. On macOS bytes may still be in a cache of the drive's own.
    """
    if not path.is_dir():
        flags = os.O_RDWR  # Windows waits for nothing that is only read.
    elif hasattr(os, "O_DIRECTORY"):
        flags = os.O_RDONLY
    else:
        return
    descriptor = os.open(path, flags)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_synced(path: Path, data: bytes) -> None:
    """Write a file in its place and wait until its bytes are on the disk."""
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


class RevertibleFile:
    """A small file that is replaced as a whole, and whose last replacement can be taken back.

    What it held before is kept beside it, as a copy: taking a write back then needs no space, and
    no file system needs hard links for it. Whatever instant the process stops at, the file is there
    as it was before a write, or as it is after it.
    """

    def __init__(self, path: Path) -> None:
        """Use `path`, in a folder that exists and that nobody else writes to.

        What a write has left that was cut short is removed.

        Raises:
            OSError: It cannot be removed.
        """
        self.path = path
        self._previous = path.with_name(f"{path.name}.previous")
        self._fresh = path.with_name(f"{path.name}.tmp")
        self._fresh.unlink(missing_ok=True)

    def read(self) -> bytes | None:
        """Return what was written last, or None if nothing ever was.

        Raises:
            OSError: It cannot be read.
        """
        try:
            return self.path.read_bytes()
        except FileNotFoundError:
            return None

    def write(self, data: bytes) -> None:
        """Make `data` durable; on an error the file is as it was.

        Raises:
            OSError: No space, no permission, or a failing disk.
        """
        try:
            write_synced(self._fresh, data)
            before = self.read()
            if before is None:
                self._previous.unlink(missing_ok=True)
            else:
                write_synced(self._previous, before)
            self._fresh.replace(self.path)
        except OSError:
            self._fresh.unlink(missing_ok=True)
            raise
        try:
            sync(self.path.parent)
        except OSError:
            # Not known to be durable, so it must not be in force either.
            self.undo()
            raise

    def undo(self) -> None:
        """Take the last write back; to be called once after it.

        Raises:
            OSError: The disk refuses.
        """
        if self._previous.exists():
            self._previous.replace(self.path)
        else:
            self.path.unlink(missing_ok=True)
        sync(self.path.parent)


def write_file(path: Path, data: bytes) -> None:
    """Write a file, in place of what is there; its folder is made if need be.

    Raises:
        OSError: It could not be written; what was there is there still, or the whole of the new.
    """
    with replacing(path) as fresh:
        fresh.write_bytes(data)


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a file's name beside `path` to write to; what is written takes the place of `path`.

    Raises:
        OSError: It could not be written; what was there is there still, or the whole of the new.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = _beside(path)
    try:
        with naming(path):
            yield fresh
            sync(fresh)
            fresh.replace(path)
            sync(path.parent)
    finally:
        fresh.unlink(missing_ok=True)


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """Yield an empty folder beside `path` to fill; it becomes `path`, where nothing may be.

    Raises:
        OSError: It could not be written; nothing is left, or the whole of it.
    """
    fresh = _beside(path)
    shutil.rmtree(fresh, ignore_errors=True)  # Of a process of this number that was killed.
    fresh.mkdir(parents=True)
    try:
        with naming(path):
            yield fresh
            for each in (*fresh.rglob("*"), fresh):
                sync(each)
            fresh.rename(path)
            sync(path.parent)
    finally:
        shutil.rmtree(fresh, ignore_errors=True)


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Let an OSError that names no file name `path`: a write to a full disk raises one."""
    try:
        yield
    except OSError as error:
        if error.filename is not None or error.errno is None:
            raise
        raise OSError(f"{path}: cannot be written: {error.strerror}") from error


def _beside(path: Path) -> Path:
    # The process's number: two that write one thing at a time must not share it.
    return path.with_name(f".{path.name}.{os.getpid()}")

"""`superpose-server` in a process that lacks what only Linux, or only POSIX, has.

A stand-in for Windows, and for macOS, which lacks less. It cannot show what those systems do, only
that nothing of ours asks for what they have not. Other people's libraries are imported before: they
have ways of their own there.
"""

from __future__ import annotations

import asyncio
import ctypes
import errno
import fcntl
import mmap
import os
import shutil
import signal
import socket
import sys
from pathlib import Path
from typing import Any

import filelock  # noqa: F401
import grpc.aio  # noqa: F401
import prometheus_client  # noqa: F401
import torch  # noqa: F401
import transformers.modeling_utils  # noqa: F401


def take_away() -> None:
    """From now on this process is on a system of which little is known."""
    lacking: tuple[tuple[Any, tuple[str, ...]], ...] = (
        (signal, ("SIGHUP",)),
        (os, ("O_NOFOLLOW", "O_NONBLOCK", "O_CLOEXEC", "O_DIRECTORY")),
        (mmap, ("MAP_PRIVATE", "MAP_ANONYMOUS", "MADV_HUGEPAGE")),
    )
    for owner, names in lacking:
        for name in names:
            delattr(owner, name)
    # As the base of all loops has it: NotImplementedError.
    del asyncio.SelectorEventLoop.add_signal_handler
    _open_no_folders()
    _link_nothing()
    _flush_only_what_may_be_written()
    _have_no_libc()
    _have_no_proc()
    # Means nothing here, and is there to be asked for.
    socket.SO_EXCLUSIVEADDRUSE = socket.SO_KEEPALIVE  # type: ignore[attr-defined]
    sys.modules["fcntl"] = None  # type: ignore[assignment]


def _open_no_folders() -> None:
    real = os.open

    def opened(path: Any, *arguments: Any, **options: Any) -> int:
        if os.path.isdir(path):  # noqa: PTH112  # Path may be in the midst of it.
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
        return real(path, *arguments, **options)

    os.open = opened
    shutil._use_fd_functions = False  # type: ignore[attr-defined]


def _link_nothing() -> None:
    """Be on a file system without links, as FAT is, and many that a network brings."""

    def refused(*arguments: Any, **_: Any) -> None:
        raise PermissionError(errno.EPERM, os.strerror(errno.EPERM), *map(str, arguments))

    os.link = os.symlink = refused


def _flush_only_what_may_be_written() -> None:
    real, ask, question = os.fsync, fcntl.fcntl, fcntl.F_GETFL

    def fsync(descriptor: int) -> None:
        if ask(descriptor, question) & os.O_ACCMODE == os.O_RDONLY:
            raise OSError(errno.EBADF, os.strerror(errno.EBADF))
        real(descriptor)

    os.fsync = fsync  # type: ignore[assignment]


def _have_no_libc() -> None:
    class Library(ctypes.CDLL):
        def __init__(self, name: str | None, *arguments: Any, **options: Any) -> None:
            if name is None:
                raise TypeError("LoadLibrary() argument 1 must be str, not None")
            super().__init__(name, *arguments, **options)

    ctypes.CDLL = Library  # type: ignore[misc]


def _have_no_proc() -> None:
    real = Path.read_text

    def read_text(self: Path, *arguments: Any, **options: Any) -> str:
        if self.is_relative_to("/proc") or self.is_relative_to("/sys"):
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(self))
        return real(self, *arguments, **options)

    Path.read_text = read_text  # type: ignore[method-assign]


if __name__ == "__main__":
    take_away()
    from superpose_server.__main__ import main

    main()

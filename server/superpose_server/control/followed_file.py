"""Where a followed file lies, and its bytes: a path, or a URL that fsspec opens."""

from __future__ import annotations

import os
import re
import threading
from concurrent.futures import CancelledError, Future, InvalidStateError
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO

from superpose_adapters.one_line import escaped, with_kind
from superpose_adapters.without_secrets import without_secrets
from superpose_server.control.mix_file import MOST_BYTES, MixFile, MixFileError, parse_mix_file

# Seconds that a disk or a network may take to answer.
PATIENCE = 30.0


class FollowedFile:
    """A file that is read again and again; one thread at a time may do so.

    Its bytes are read each time, and not only when a stamp of it has changed, as tokens and
    certificates are (`door/reread`): a URL has no stamp, and what could not be reached with the
    same bytes a moment ago may be reached now.

    Attributes:
        name: The path or URL, without what a URL may hold of secrets.
        short_name: The last part of it, for clients.
    """

    def __init__(self, location: str) -> None:
        """Read nothing yet; `location` is a path, or a URL with `://`."""
        self._location = location
        self._is_url = "://" in location
        shown = without_secrets(location)
        self.name = escaped(shown)
        self.short_name = escaped(re.split(r"[/\\]", shown.rstrip("/\\"))[-1])
        self._closed = False
        self._reading: Future[bytes] | None = None
        self._remote: tuple[Any, str] | None = None  # A file system of fsspec's, the path there.

    def read(self) -> MixFile:
        """Return what the file says now.

        Raises:
            MixFileError: It cannot be read, does not answer, or cannot be followed.
            CancelledError: `close` was called.
        """
        return parse_mix_file(self._bytes())

    def close(self) -> None:
        """End a reading that is under way; for any thread."""
        self._closed = True
        reading = self._reading
        if reading is not None:
            reading.cancel()

    def _bytes(self) -> bytes:
        # On a thread of its own each time, as nothing else bounds what a network may take; and
        # what has not answered is not asked a second time beside the first.
        reading = self._reading
        if reading is None:
            reading = self._reading = Future()
            threading.Thread(
                target=self._settle, args=(reading,), name="follow-read", daemon=True
            ).start()
        if self._closed:
            raise CancelledError
        try:
            read = reading.result(PATIENCE)
        except TimeoutError:  # Not the reading's own, which is a MixFileError by now.
            raise MixFileError(f"it has not answered within {PATIENCE:g} s") from None
        except MixFileError:
            self._reading = None
            raise
        self._reading = None
        return read

    def _settle(self, reading: Future[bytes]) -> None:
        with suppress(InvalidStateError):  # Nobody waits any more.
            try:
                read = self._open_and_read()
            except MixFileError as error:
                reading.set_exception(error)
            except Exception as error:  # Of whatever library knows the URL.
                reading.set_exception(MixFileError(_why(error)))
            else:
                reading.set_result(read)

    def _open_and_read(self) -> bytes:
        if not self._is_url:
            with Path(self._location).open("rb") as file:
                return _read(file)
        if self._remote is None:
            self._remote = _file_system(self._location)
        file_system, path = self._remote
        try:
            file_system.invalidate_cache()  # Of what was there before.
            with file_system.open(path, "rb") as opened:
                return _read(opened)
        except BaseException:
            self._remote = None  # It may have a connection that is broken for good.
            raise


def _read(file: BinaryIO) -> bytes:
    """Return what a file holds, or so much of it that it is too much."""
    read = bytearray()
    # In parts, since a network gives what has arrived, and not what was asked for.
    while len(read) <= MOST_BYTES and (part := file.read(MOST_BYTES + 1 - len(read))):
        read += part
    return bytes(read)


def _file_system(url: str) -> tuple[Any, str]:
    """Return fsspec's file system of a URL, and the path in it.

    Raises:
        MixFileError: There is none.
    """
    import fsspec

    scheme = url.partition("://")[0]
    if "::" in url:
        raise MixFileError(
            "a URL with :: is not followed, as what it reads may be kept: name the file alone"
        )
    try:
        fsspec.get_filesystem_class(scheme)
    except ImportError as error:  # In words that have nothing of the URL.
        remedy = "pip install aiohttp" if scheme in ("http", "https") else "install it"
        raise MixFileError(
            f"a URL of {scheme} needs a package that is not here ({with_kind(error)}): {remedy}"
        ) from None
    except ValueError:
        raise MixFileError(
            f"its scheme {escaped(scheme)} is unknown: use a path, https://, s3:// or gs://"
        ) from None
    # An instance of its own: others keep what they, or anybody in this process, have seen.
    file_system, path = fsspec.core.url_to_fs(url, skip_instance_cache=True)
    return file_system, path


def _why(error: Exception) -> str:
    """Return why a file cannot be read, in words of ours: others' may have the whole URL."""
    if isinstance(error, OSError) and isinstance(error.errno, int):
        return f"it cannot be read ({os.strerror(error.errno)})"  # Not `strerror`, for the same.
    return f"it cannot be read ({type(error).__name__})"

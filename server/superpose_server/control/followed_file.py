"""Where a followed file lies, and its bytes: a path, or a URL that fsspec opens."""

from __future__ import annotations

import os
import re
import threading
from concurrent.futures import CancelledError, Future, InvalidStateError
from contextlib import suppress
from pathlib import Path

from superpose_adapters.one_line import escaped, with_kind
from superpose_server.control.mix_file import MOST_BYTES, MixFile, MixFileError, parse_mix_file

# Seconds that a disk or a network may take to answer.
PATIENCE = 30.0
# What a URL may hold that is not for everybody: a user and a password, and a signature.
_USER = re.compile(r"//[^/@]*@")
_QUERY = re.compile(r"[?#].*", re.DOTALL)


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
        shown = _QUERY.sub("", _USER.sub("//", location)) if self._is_url else location
        self.name = escaped(shown)
        self.short_name = escaped(re.split(r"[/\\]", shown.rstrip("/\\"))[-1])
        self._closed = False
        self._reading: Future[bytes] | None = None

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
            except Exception as error:  # Of whatever library knows the URL.
                reading.set_exception(MixFileError(self._why(error)))
            else:
                reading.set_result(read)

    def _open_and_read(self) -> bytes:
        if not self._is_url:
            with Path(self._location).open("rb") as file:
                return file.read(MOST_BYTES + 1)
        import fsspec

        with fsspec.open(self._location, "rb") as opened:
            read: bytes = opened.read(MOST_BYTES + 1)
            return read

    def _why(self, error: Exception) -> str:
        if isinstance(error, ImportError):
            scheme = self.name.partition("://")[0]
            remedy = "pip install aiohttp" if scheme in ("http", "https") else "install it"
            return (
                f"a URL of {scheme} needs a package that is not here ({with_kind(error)}): {remedy}"
            )
        if isinstance(error, OSError) and isinstance(error.errno, int):
            # Not `strerror`, in which a library may have put the URL.
            return f"it cannot be read ({os.strerror(error.errno)})"
        # Others' words may have the whole URL in them.
        whole = self.name == self._location
        return f"it cannot be read ({escaped(with_kind(error)) if whole else type(error).__name__})"

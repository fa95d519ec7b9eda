"""`adapterctl` on a terminal of its own."""

import contextlib
import os
import re
import select
import signal
import subprocess
import sys
from types import TracebackType
from typing import Self

import pytest
from tests.client.fake_server import FakeServer

PATIENCE = 30.0  # seconds


class Terminal:
    """A running command: `shown` is all that its terminal got, with control sequences."""

    def __init__(
        self,
        server: FakeServer,
        *arguments: str,
        columns: int = 80,
        lines: int = 24,
        **environment: str,
    ) -> None:
        pty = pytest.importorskip("pty")
        self.shown = ""
        self._controller, terminal = pty.openpty()
        self._process = subprocess.Popen(
            [sys.executable, "-m", "superpose_client.cli", *arguments],
            stdin=terminal,
            stdout=terminal,
            stderr=terminal,
            env={
                **os.environ,
                "SUPERPOSE_SERVER": server.address,
                "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
                "PYTHONIOENCODING": "utf-8",
                "TERM": "xterm",
                "COLUMNS": str(columns),
                "LINES": str(lines),
                **environment,
            },
            # A job that a shell put in the background ignores SIGINT, and hands that down.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
        )
        os.close(terminal)

    @property
    def plain(self) -> str:
        """What was shown, without control sequences."""
        return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", self.shown).replace("\r", "")

    def see(self, text: str, times: int = 1) -> None:
        """Wait until a text was shown so many times."""
        while self.plain.count(text) < times:
            assert self._read(), f"ended without {text!r}: {self.plain}"

    def see_last(self, text: str) -> None:
        """Wait until a text is the last that was shown."""
        while not self.plain.endswith(text):
            assert self._read(), f"ended without {text!r} at its end: {self.plain}"

    def press(self, keys: str) -> None:
        os.write(self._controller, keys.encode())

    def interrupt(self) -> None:
        """Do what Ctrl-C does."""
        self._process.send_signal(signal.SIGINT)

    def end(self) -> int:
        """Wait for the end of the command and return its status."""
        while self._read():
            pass
        return self._process.wait(PATIENCE)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._process.kill()
        self._process.wait(PATIENCE)
        os.close(self._controller)

    def _read(self) -> bool:
        """Read what has come, or wait for it; return whether there may be more."""
        readable, _, _ = select.select([self._controller], [], [], PATIENCE)
        assert readable, f"nothing more came: {self.plain}"
        data = b""
        # Linux says so when the command has closed the terminal.
        with contextlib.suppress(OSError):
            data = os.read(self._controller, 65_536)
        self.shown += data.decode(errors="replace")
        return data != b""

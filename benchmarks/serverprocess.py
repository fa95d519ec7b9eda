"""A real server in a process of its own, on free ports, with a state folder that goes with it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType

# What a server gets to end in; then it is killed.
_GRACE = 30.0
_LOG_LINES = 20


class ServerFailed(Exception):
    """The server did not start, or ended early; the end of its log."""


class ServerProcess:
    """`superpose-server` as a user runs it.

    Attributes:
        address: HOST:PORT that it serves gRPC on.
        http_address: The same for HTTP, if a flag asks for it.
        process: The process.
    """

    def __init__(self, base: Path, adapter_dir: Path | None, flags: Sequence[str] = ()) -> None:
        """Start the server and wait until it is ready.

        Raises:
            ServerFailed: It ended instead.
        """
        self._folder = tempfile.TemporaryDirectory(prefix="superpose-bench-")
        self._log = Path(self._folder.name) / "log"
        command = [
            *(sys.executable, "-m", "superpose_server", f"--base={base}"),
            *("--listen=127.0.0.1:0", "--metrics-listen=127.0.0.1:0"),
            f"--state-dir={Path(self._folder.name) / 'state'}",
            *(() if adapter_dir is None else (f"--adapter-dir={adapter_dir}",)),
            *flags,
        ]
        with self._log.open("w") as log:
            self.process = subprocess.Popen(
                command,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
            )
        assert self.process.stdout is not None
        ready = self.process.stdout.readline()
        if not ready.startswith("ready "):
            log_end = self.log_end()
            self.close()
            raise ServerFailed(f"the server did not start:\n{log_end}")
        words = dict(word.partition("=")[::2] for word in ready.split()[1:])
        self.address, self.http_address = words["address"], words.get("http", "")

    def log_end(self) -> str:
        """Return the last lines of its log."""
        return "\n".join(self._log.read_text().splitlines()[-_LOG_LINES:])

    def memory(self) -> int:
        """Return the bytes that it holds in memory now (Linux)."""
        return resident_bytes(self.process.pid)

    def close(self) -> None:
        """Stop the server and remove its state."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
            try:
                self.process.wait(_GRACE)
            except subprocess.TimeoutExpired:
                self.process.kill()
        self.process.wait()
        if self.process.stdout is not None:
            self.process.stdout.close()
        self._folder.cleanup()

    def __enter__(self) -> ServerProcess:
        """Return the server."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Stop it."""
        self.close()


def resident_bytes(pid: int) -> int:
    """Return the resident set of a process (Linux)."""
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")

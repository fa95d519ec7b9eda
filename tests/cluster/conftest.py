"""Replicas kept by Ray Serve, which `make cluster` installs: real servers of the bundled base."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from importlib.util import find_spec
from ipaddress import IPv4Address, IPv6Address
from pathlib import Path

import pytest
from tests.integration.harness import PATIENCE, ServerProcess, wait_until

from superpose_adapters.bundled import MINI
from superpose_client import Client, Replica

# `make test` has none of them, and `make cluster` fails if it finds no test.
_NEEDED = ("ray", "moto", "s3fs")
collect_ignore_glob = [] if all(map(find_spec, _NEEDED)) else ["test_*.py"]


# Seconds that Ray and what it starts may take on a slow machine: it imports torch once a process.
STARTS = 240.0


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Let tests that start servers twice take their time."""
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.timeout(2 * STARTS))


class Cluster(ServerProcess):
    """A `superpose-server --replicas N`, and the processes below it."""

    def __init__(self, state_dir: Path, replicas: int, *flags: str) -> None:
        self.wanted, self.state_dir = replicas, state_dir
        super().__init__(
            MINI.name, state_dir, f"--replicas={replicas}", "--replica-cpus=0.5", *flags
        )
        if not self.ready:
            status, log = self.wait()
            self.__exit__()
            pytest.fail(f"the server ended with {status}:\n{log[-4000:]}")

    def replicas(self, client: Client) -> tuple[Replica, ...]:
        return client.info().replicas

    def wait_for_all(self, client: Client) -> tuple[Replica, ...]:
        """Wait until as many replicas as are wanted answer, and hold what is acknowledged."""

        def settled() -> bool:
            info = client.info()
            return len(info.replicas) == self.wanted and all(
                (each.generation, each.digest) == (info.mix.generation, info.mix.digest)
                for each in info.replicas
            )

        wait_until(settled, "all replicas hold the default mix", STARTS)
        return self.replicas(client)

    def pids(self, role: bytes) -> list[int]:
        return pids_below(self.process.pid, role)

    def kill_replica(self) -> int:
        """Kill one replica, and return what its process was."""
        pid = self.pids(b"ServeReplica:superpose:replica")[0]
        os.kill(pid, signal.SIGKILL)
        return pid


def pids_below(ancestor: int, role: bytes) -> list[int]:
    """Return the processes below one whose title holds `role`."""
    found = []
    for file in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            title = file.read_bytes()
        except OSError:
            continue
        if role in title and _descends(int(file.parent.name), ancestor):
            found.append(int(file.parent.name))
    return sorted(found)


def listening(pid: int) -> list[tuple[IPv4Address | IPv6Address, int]]:
    """Return where a process listens."""
    inodes = set()
    for descriptor in Path(f"/proc/{pid}/fd").glob("*"):
        with suppress(OSError):
            inodes.add(str(descriptor.readlink()).removeprefix("socket:[").removesuffix("]"))
    found: list[tuple[IPv4Address | IPv6Address, int]] = []
    for name, kind in (("tcp", IPv4Address), ("tcp6", IPv6Address)):
        for line in Path(f"/proc/{pid}/net/{name}").read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == "0A" and fields[9] in inodes:
                words, _, port = fields[1].partition(":")
                # Words of 32 bits, each in the machine's own order.
                raw = b"".join(
                    int(words[at : at + 8], 16).to_bytes(4, sys.byteorder)
                    for at in range(0, len(words), 8)
                )
                found.append((kind(raw), int(port, 16)))
    return found


def _descends(pid: int, ancestor: int) -> bool:
    while pid > 1:
        if pid == ancestor:
            return True
        try:
            stat = Path(f"/proc/{pid}/stat").read_bytes()
        except OSError:
            return False
        pid = int(stat.rpartition(b")")[2].split()[1])
    return False


@contextmanager
def ended(cluster: Cluster) -> Iterator[Cluster]:
    """End a cluster in order, whatever happens."""
    with cluster:
        yield cluster
        cluster.terminate()
        cluster.process.wait(PATIENCE)


@pytest.fixture
def begin(tmp_path: Path) -> Iterator[Callable[..., Cluster]]:
    """Start clusters on one state folder, one after the other; they end with the test."""
    with ExitStack() as stack:
        yield lambda *flags: stack.enter_context(ended(Cluster(tmp_path / "state", 2, *flags)))


@pytest.fixture(scope="session")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """Two replicas that no test kills."""
    state = tmp_path_factory.mktemp("cluster") / "state"
    with ended(Cluster(state, 2, "--http-listen=127.0.0.1:0")) as one:
        yield one

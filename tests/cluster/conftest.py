"""Replicas kept by Ray Serve, which `make cluster` installs: real servers of the bundled base."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from importlib.util import find_spec
from pathlib import Path

import pytest
from tests.integration.harness import PATIENCE, ServerProcess, wait_until

from superpose_adapters.bundled import MINI
from superpose_client import Client, Replica

# `make test` has none of them, and `make cluster` fails if it finds no test.
_NEEDED = ("ray", "moto", "s3fs")
collect_ignore_glob = [] if all(map(find_spec, _NEEDED)) else ["test_*.py"]


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

        wait_until(settled, "all replicas hold the default mix")
        return self.replicas(client)

    def pids(self, role: bytes) -> list[int]:
        """Return the processes below this one whose title holds `role`."""
        found = []
        for file in Path("/proc").glob("[0-9]*/cmdline"):
            try:
                title = file.read_bytes()
            except OSError:
                continue
            if role in title and _descends(int(file.parent.name), self.process.pid):
                found.append(int(file.parent.name))
        return sorted(found)

    def kill_replica(self) -> int:
        """Kill one replica, and return what its process was."""
        pid = self.pids(b"ServeReplica:superpose:replica")[0]
        os.kill(pid, signal.SIGKILL)
        return pid


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

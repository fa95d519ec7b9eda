"""The application of a Ray Serve config file, deployed as `serve run` does."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.cluster.conftest import STARTS, pids_below
from tests.integration.harness import PATIENCE, wait_until

from superpose_client import CallError, Client

# Deploys what its argument says, and prints the addresses whenever it reads a line.
DRIVER = """
import json, sys, ray
from ray import serve
from superpose_server.application import build

ray.init(_node_ip_address="127.0.0.1", include_dashboard=False, logging_level="WARNING")
serve.start(proxy_location="Disabled")
doors = serve.run(build(json.loads(sys.argv[1])), name="superpose", route_prefix=None)
for _ in sys.stdin:
    print("addresses", json.dumps(doors.addresses.remote().result()), flush=True)
serve.shutdown()
ray.shutdown()
"""


class Deployed:
    """An application in a Ray of its own."""

    def __init__(self, root: Path) -> None:
        (root / "shared").mkdir()
        arguments = {
            "base": "mini",
            "state_dir": str(root / "state"),
            "store": str(root / "shared"),
            "replicas": 2,
            "replica_cpus": 0.3,
            "listen": "127.0.0.1:0",
            "metrics_listen": "127.0.0.1:0",
            "dtype": "float32",
            "compile": "off",
        }
        self.errors = root / "stderr"
        with self.errors.open("w") as errors:
            self.process = subprocess.Popen(
                [sys.executable, "-c", DRIVER, json.dumps(arguments)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
                env={
                    **os.environ,
                    "PYTHONPATH": os.pathsep.join(sys.path),
                    "XDG_CACHE_HOME": str(root / "cache"),
                },
            )

    def address(self) -> str:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        print(file=self.process.stdin, flush=True)
        for line in self.process.stdout:  # Ray writes there, too.
            word, _, found = line.partition(" ")
            if word == "addresses":
                address: str = json.loads(found)["grpc"]
                return address
        pytest.fail(self.errors.read_text()[-3000:])

    def close(self) -> None:
        self.process.communicate(timeout=PATIENCE)


@pytest.fixture(scope="module")
def deployed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Deployed]:
    one = Deployed(tmp_path_factory.mktemp("application"))
    try:
        yield one
    finally:
        one.close()


def test_a_server_that_ray_starts_again_leads_the_same_replicas(deployed: Deployed) -> None:
    with Client(deployed.address(), timeout=PATIENCE) as client:
        client.set("math")
        state = client.add("medicine", 0.5)
        before = {(r.name, r.generation, r.digest) for r in client.info().replicas}
        assert {(generation, digest) for _, generation, digest in before} == {
            (state.generation, state.digest)
        }
        text = client.generate("The patient", max_new_tokens=16, temperature=0).text
    [doors] = pids_below(deployed.process.pid, b"ServeReplica:superpose:doors")
    os.kill(doors, signal.SIGKILL)

    def again() -> bool:
        try:
            with Client(deployed.address(), timeout=PATIENCE, retries=0) as client:
                return client.info().mix.digest == state.digest
        except CallError:  # The address of the one that was killed.
            return False

    wait_until(again, "another server is there", STARTS)
    with Client(deployed.address(), timeout=PATIENCE) as client:
        assert {(r.name, r.generation, r.digest) for r in client.info().replicas} == before
        assert client.generate("The patient", max_new_tokens=16, temperature=0).text == text
        after = client.remove("math")
        assert after.generation == state.generation + 1
        assert {r.digest for r in client.info().replicas} == {after.digest}
        assert client.verify().ok


REFUSED: list[tuple[dict[str, object], str]] = [
    ({"base": "mini"}, "store is needed"),
    ({"base": "mini", "store": "x", "maxbatch": 3}, "maxbatch is no flag"),
    ({"store": "x"}, "base is needed"),
]
TRIES = """
import json, sys
from superpose_server.application import build

for arguments in json.loads(sys.argv[1]):
    try:
        build(arguments)
    except ValueError as error:
        print(error)
"""


def test_a_config_that_means_nothing_is_refused() -> None:
    arguments = json.dumps([arguments for arguments, _ in REFUSED])
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    tried = subprocess.run(
        [sys.executable, "-c", TRIES, arguments],
        capture_output=True,
        text=True,
        check=True,
        env=environment,
        timeout=PATIENCE,
    )
    for line, (_, said) in zip(tried.stdout.splitlines(), REFUSED, strict=True):
        assert line.startswith(said)

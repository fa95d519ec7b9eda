"""What is lost with a replica, with Ray's controller, with the server: as little as can be."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest
from tests.cluster.conftest import STARTS, Cluster, ended
from tests.integration.harness import PATIENCE, wait_until

from superpose_client import Client, GenerateOptions, UnavailableError

LONG: GenerateOptions = {"max_new_tokens": 200, "temperature": 0.0, "ignore_eos": True}
SHORT: GenerateOptions = {"max_new_tokens": 16, "temperature": 0.0, "ignore_eos": True}
Begin = Callable[..., Cluster]


@pytest.fixture(scope="module")
def lasting(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """A cluster whose replicas are killed by one test after the other."""
    root = tmp_path_factory.mktemp("losses")
    (root / "shared").mkdir()
    with ended(Cluster(root / "state", 2, f"--store={root / 'shared'}")) as cluster:
        yield cluster


def read(client: Client, prompt: str, first: Callable[[], object]) -> list[int]:
    ids: list[int] = []
    with client.stream(prompt, mix="medicine", **LONG) as chunks:
        for chunk in chunks:
            if not ids:
                first()
            ids += chunk.token_ids
    return ids


def test_a_killed_replica_takes_its_own_calls_alone(lasting: Cluster) -> None:
    cluster = lasting
    with cluster.client() as client, ThreadPoolExecutor(8) as pool:
        state = client.set("math,finance=0.5")
        [whole] = {tuple(read(client, "The patient", int)) for _ in range(2)}
        begun: list[int] = []
        streams: list[Future[list[int]]] = [
            pool.submit(read, client, "The patient", lambda: begun.append(1)) for _ in range(8)
        ]
        wait_until(lambda: len(begun) == 8, "all streams run")
        cluster.kill_replica()
        errors = [one.exception(PATIENCE) for one in streams]
        lost = [error for error in errors if error is not None]
        assert 0 < len(lost) < len(streams)
        for error in lost:
            assert isinstance(error, UnavailableError)
            assert error.reason == "REPLICA_LOST"
        kept = [one for one, error in zip(streams, errors, strict=True) if error is None]
        assert {tuple(one.result()) for one in kept} == {whole}
        # Sent again by a client that may, it is answered at once: by the other one.
        with Client(cluster.address, timeout=PATIENCE) as patient:
            assert tuple(patient.generate("The patient", mix="medicine", **LONG).token_ids) == whole
        # And the successor holds what was acknowledged.
        replicas = cluster.wait_for_all(client)
        assert {(r.generation, r.digest) for r in replicas} == {(state.generation, state.digest)}
        assert client.verify().ok


def test_a_change_while_a_replica_is_dead_reaches_its_successor(lasting: Cluster) -> None:
    cluster = lasting
    with cluster.client() as client:
        client.set("math")
        cluster.kill_replica()
        state = client.set("medicine")
        assert {r.digest for r in cluster.replicas(client)} == {state.digest}
        replicas = cluster.wait_for_all(client)
        assert {r.generation for r in replicas} == {state.generation}
        assert client.verify().ok


def test_a_controller_that_dies_changes_nothing(lasting: Cluster) -> None:
    cluster = lasting
    with cluster.client() as client:
        state = client.set("math")
        text = client.generate("x", **SHORT).text
        [controller] = cluster.pids(b"ServeController")
        os.kill(controller, signal.SIGKILL)
        wait_until(
            lambda: cluster.pids(b"ServeController") not in ([], [controller]), "a new one", STARTS
        )
        assert client.mix().digest == state.digest
        assert client.generate("x", **SHORT).text == text
        after = client.add("medicine")
        assert after.generation == state.generation + 1
        cluster.wait_for_all(client)
        assert client.verify().ok


def test_a_server_that_starts_again_goes_on_with_its_mix(begin: Begin) -> None:
    first = begin()
    with first.client() as client:
        state = client.set("math=0.5,finance")
        text = client.generate("x", **SHORT).text
    first.terminate()
    status, log = first.wait()
    assert status == 0, log
    assert first.pids(b"ray::") == []

    second = begin()
    with second.client() as client:
        assert (client.mix().generation, client.mix().digest) == (state.generation, state.digest)
        assert {r.digest for r in second.wait_for_all(client)} == {state.digest}
        assert client.generate("x", **SHORT).text == text


def spoil(folder: Path) -> int:
    """Flip a bit of every tensor file of adapters in `folder`."""
    files = list(folder.glob("objects/*/adapter_model.safetensors"))
    for file in files:
        content = bytearray(file.read_bytes())
        content[-1] ^= 1
        file.write_bytes(content)
    return len(files)


def test_a_damaged_copy_of_an_adapter_is_repaired_from_the_store(lasting: Cluster) -> None:
    cluster = lasting
    with cluster.client() as client:
        state = client.set("math")
        text = client.generate("x", **SHORT).text
        assert spoil(cluster.state_dir / "adapters") == 3
        cluster.kill_replica()
        cluster.wait_for_all(client)
        assert client.verify().ok
        assert {client.generate("x", **SHORT).text for _ in range(6)} == {text}
        assert {r.digest for r in cluster.replicas(client)} == {state.digest}


def test_a_replica_without_an_adapter_stays_out_and_nothing_else_is_served(begin: Begin) -> None:
    cluster = begin()
    with cluster.client() as client:
        client.set("math")
        text = client.generate("x", **SHORT).text
        assert spoil(cluster.state_dir / "adapters") == 3
        gone = cluster.kill_replica()
        wait_until(
            lambda: gone not in cluster.pids(b"ServeReplica:superpose:replica"), "the replica died"
        )
        with Client(cluster.address, timeout=PATIENCE) as patient:
            assert {patient.generate("x", **SHORT).text for _ in range(12)} == {text}


def test_a_base_that_cannot_be_loaded_is_refused_in_a_line(tmp_path: Path) -> None:
    (tmp_path / "base").mkdir()
    from tests.integration.harness import spawn

    process, errors = spawn(tmp_path / "base", tmp_path / "state", "--replicas=1")
    assert process.wait(STARTS) == 1
    if process.stdout is not None:
        process.stdout.close()
    last = errors.read_text().splitlines()[-1]
    assert last.startswith("superpose-server: ")
    assert str(tmp_path / "base") in last


@pytest.mark.parametrize("flag", ["--replicas=0", "--replica-cpus=0", "--replica-gpus=-1"])
def test_what_means_nothing_is_refused(tmp_path: Path, flag: str) -> None:
    from tests.integration.harness import spawn

    process, errors = spawn("mini", tmp_path / "state", flag)
    assert process.wait(PATIENCE) == 2
    if process.stdout is not None:
        process.stdout.close()
    assert flag.partition("=")[0] in errors.read_text()

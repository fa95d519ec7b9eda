"""One mix on every replica, and what clients see of it."""

from __future__ import annotations

import json
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from ipaddress import IPv6Address
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families
from tests.cluster.conftest import Cluster, listening, pids_below
from tests.integration.harness import ServerProcess, wait_until

from superpose_adapters.bundled import MINI
from superpose_client import Client, GenerateOptions, InvalidArgumentError, MixState, NotFoundError

MIXES = ["math", "medicine=0.5", "finance", "math=0.7,medicine=0.3", "base", "finance=-1,math"]
PROMPTS = ["What is the sum of", "The patient", "A bond is", "Question: why"]
TOKENS = 24
OPTIONS: GenerateOptions = {"max_new_tokens": TOKENS, "temperature": 0.0, "ignore_eos": True}
# Every mix with every prompt, and eight more of them: 32 streams.
ASKED = [(mix, prompt) for mix in MIXES for prompt in PROMPTS] + [
    (mix, prompt) for mix in MIXES[:2] for prompt in PROMPTS
]


@pytest.fixture
def client(cluster: Cluster) -> Iterator[Client]:
    with cluster.client() as client:
        client.set("base")
        yield client


@pytest.fixture(scope="session")
def expected(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], list[int]]:
    """What a single server answers."""
    with (
        ServerProcess(MINI.name, tmp_path_factory.mktemp("single") / "state") as single,
        single.client() as client,
    ):
        return {
            (mix, prompt): list(client.generate(prompt, mix=mix, **OPTIONS).token_ids)
            for mix, prompt in {*ASKED}
        }


def stream(client: Client, mix: str, prompt: str) -> tuple[list[int], dict[str, float]]:
    ids: list[int] = []
    used: dict[str, float] = {}
    with client.stream(prompt, mix=mix, **OPTIONS) as chunks:
        for chunk in chunks:
            ids += chunk.token_ids
            if chunk.mix is not None:
                used = dict(chunk.mix.weights)
    return ids, used


def test_every_stream_s_text_is_a_single_server_s_while_the_mix_changes(
    cluster: Cluster, client: Client, expected: dict[tuple[str, str], list[int]]
) -> None:
    with ThreadPoolExecutor(32) as pool:
        streams = [pool.submit(stream, client, mix, prompt) for mix, prompt in ASKED]
        generation = client.mix().generation
        changes: list[Callable[[], MixState]] = [
            lambda: client.add("math"),
            lambda: client.add("medicine", 0.5),
            lambda: client.set("finance=0.3,math"),
            lambda: client.remove("finance"),
            lambda: client.set("base"),
        ]
        for change in changes:
            state = change()
            generation += 1
            assert state.generation == generation
            held = {(r.generation, r.digest) for r in cluster.replicas(client)}
            assert held == {(state.generation, state.digest)}
        for asked, answer in zip(ASKED, streams, strict=True):
            assert answer.result()[0] == expected[asked]


def test_the_default_mix_is_every_replica_s(
    client: Client, expected: dict[tuple[str, str], list[int]]
) -> None:
    client.set("math")
    for _ in range(8):
        answer = client.generate(PROMPTS[0], **OPTIONS)
        assert list(answer.token_ids) == expected["math", PROMPTS[0]]
        assert answer.mix.weights == {"math": 1.0}


def test_hashes_of_all_replicas_are_compared(cluster: Cluster, client: Client) -> None:
    client.set("math,medicine=0.5")
    found = client.verify()
    assert found.ok
    assert found.mix.digest == client.mix().digest


def test_both_replicas_run_rows(cluster: Cluster, client: Client) -> None:
    before = {r.name: r.generated_tokens for r in cluster.replicas(client)}
    with ThreadPoolExecutor(16) as pool:
        list(pool.map(lambda _: stream(client, "math", PROMPTS[0]), range(16)))
    after = {r.name: r.generated_tokens for r in cluster.replicas(client)}
    assert len(after) == 2
    assert all(after[name] > before[name] for name in after)
    assert sum(after.values()) - sum(before.values()) == 16 * TOKENS


def test_errors_and_limits_are_those_of_one_server(client: Client) -> None:
    with pytest.raises(NotFoundError, match="physics"):
        client.generate("x", mix="physics")
    with pytest.raises(InvalidArgumentError, match="max_new_tokens"):
        client.generate("x", max_new_tokens=10_000_000)


def test_scores_fits_and_analyses_are_a_single_server_s(client: Client, tmp_path: Path) -> None:
    texts = ["The sum of two and two is four."]
    with ServerProcess(MINI.name, tmp_path / "state") as single, single.client() as other:
        ours, theirs = client.score(texts, mix="math=0.5"), other.score(texts, mix="math=0.5")
        assert ours.items[0].logprobs == pytest.approx(theirs.items[0].logprobs, abs=1e-4)
        first, second = client.analyze("math,medicine"), other.analyze("math,medicine")
        # Its generation is each server's own, and its stall that of a moment.
        first = replace(first, mix=second.mix, longest_stall_seconds=second.longest_stall_seconds)
        assert first == second


def test_a_pushed_adapter_is_served_by_every_replica(client: Client) -> None:
    folder = MINI.adapters()["math"]
    client.push("algebra", folder)
    try:
        answers = {
            tuple(client.generate(PROMPTS[0], mix="algebra", **OPTIONS).token_ids) for _ in range(8)
        }
        assert answers == {tuple(client.generate(PROMPTS[0], mix="math", **OPTIONS).token_ids)}
    finally:
        client.delete("algebra")


def test_a_merge_of_adapters_is_served(client: Client) -> None:
    client.merge("both", "math,medicine", method="sum")
    try:
        assert list(client.generate(PROMPTS[0], mix="both", **OPTIONS).token_ids) == list(
            client.generate(PROMPTS[0], mix="math,medicine", **OPTIONS).token_ids
        )
    finally:
        client.delete("both")


def test_over_http_it_is_the_same(cluster: Cluster, client: Client) -> None:
    body = {"model": "math", "prompt": PROMPTS[0], "max_tokens": 24, "temperature": 0}
    request = urllib.request.Request(
        f"http://{cluster.ready['http']}/v1/completions",
        json.dumps(body).encode(),
        {"Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request) as answer:
        text = json.load(answer)["choices"][0]["text"]
    assert text == client.generate(PROMPTS[0], mix="math", max_new_tokens=24, temperature=0).text


def test_a_client_that_goes_away_lets_go_of_its_row(cluster: Cluster, client: Client) -> None:
    before = client.info().generated_tokens
    with client.stream("x", max_new_tokens=240, temperature=0, ignore_eos=True) as chunks:
        next(iter(chunks))
    wait_until(lambda: client.info().running == 0, "the row left its replica")
    assert client.info().generated_tokens - before < 240


def test_metrics_are_each_replica_s(cluster: Cluster, client: Client) -> None:
    client.generate("x", max_new_tokens=2)
    with urllib.request.urlopen(f"http://{cluster.ready['metrics']}/metrics") as answer:
        families = {
            family.name: family for family in text_string_to_metric_families(answer.read().decode())
        }
    names = {replica.name for replica in cluster.replicas(client)}
    tokens = families["superpose_generation_tokens"].samples
    counted = [sample for sample in tokens if sample.name.endswith("_total")]
    assert {sample.labels["replica"] for sample in counted} == names
    assert sum(sample.value for sample in counted) == client.info().generated_tokens
    generations = families["superpose_mix_generation"].samples
    assert {sample.labels.get("replica") for sample in generations} == {None, *names}
    assert {sample.value for sample in generations} == {client.mix().generation}


def test_ray_listens_to_this_machine_alone(cluster: Cluster) -> None:
    """Whoever can call Ray runs code here."""
    open_to_all = {}
    for pid in pids_below(cluster.process.pid, b""):
        title = Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode()
        for address, port in listening(pid):
            mapped = address.ipv4_mapped if isinstance(address, IPv6Address) else None
            if not (mapped or address).is_loopback:
                open_to_all[port] = title.strip().partition(".")[0]
    # Ray Serve's own way from handle to replica, for which it takes no address; it asks for the
    # token of this server.
    assert sorted(open_to_all.values()) == ["ray::ServeReplica:superpose:replica"] * 2

"""Merging in a running server: what comes of it, who is not disturbed, and what is refused."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from tests.integration.harness import (
    PATIENCE,
    PROMPT,
    Family,
    LoopThread,
    Served,
    check_greedy,
    start,
    wait_until,
)
from tests.integration.http_client import Http
from tests.makers import load_peft

from superpose_adapters.merge.deviation import deviation_norms
from superpose_adapters.merge.method import Method
from superpose_adapters.merge.methods import METHODS
from superpose_adapters.merge.plain_sum import PlainSum
from superpose_adapters.merge.term import Pair, Term
from superpose_client import (
    AdapterInfo,
    AlreadyExistsError,
    CallError,
    Client,
    DataLossError,
    FailedPreconditionError,
    InvalidArgumentError,
    NotFoundError,
    QueueFullError,
    UnavailableError,
    format_mix,
)
from superpose_proto.v1 import adapter_pb2, adapter_pb2_grpc, mix_pb2
from superpose_server.control import merger

QA = {"a": 1.0, "b": -0.3}
MAX_RANK = 8  # Two of these adapters, of rank 4, fit.


@pytest.fixture(scope="module")
def server(
    loop: LoopThread, gpt2: Family, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Served]:
    served = start(
        loop,
        gpt2.base,
        tmp_path_factory.mktemp("merge") / "state",
        http_listen="127.0.0.1:0",
        max_rank=MAX_RANK,
        verify_every=0,  # A test damages an adapter.
    )
    gpt2.push_all(served.client)
    yield served
    served.stop()


@pytest.fixture
def served(server: Served) -> Iterator[Served]:
    """The server with a=1 as the default mix; what a test merges goes with it."""
    server.client.set("a")
    yield server
    server.client.set("a")
    for adapter in server.client.adapters():
        if adapter.domain not in ("a", "b", "c"):
            server.client.delete(adapter.domain)


class Gate:
    """Holds a merge in its first module, until it is let go."""

    def __init__(self) -> None:
        self.entered, self.let_go = threading.Semaphore(0), threading.Event()
        self.modules: list[str] = []
        self.threads: set[tuple[str, int]] = set()

    def wait(self, module: str) -> None:
        self.modules.append(module)
        self.threads.add((threading.current_thread().name, torch.get_num_threads()))
        self.entered.release()
        assert self.let_go.wait(PATIENCE)


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> Iterator[Gate]:
    """What holds a merge by the method `held`, which is the plain sum."""
    gate = Gate()

    @dataclass(frozen=True)
    class Held(Method):
        name: ClassVar[str] = "held"

        def merge(self, module: str, parts: int, terms: Sequence[Term]) -> Pair:
            gate.wait(module)
            return PlainSum().merge(module, parts, terms)

    monkeypatch.setitem(METHODS, "held", Held)
    yield gate
    gate.let_go.set()


def object_of(served: Served, domain: str) -> Path:
    """The folder in which the server keeps an adapter."""
    objects = served.runtime.config.state_dir / "adapters" / "objects"  # type: ignore[operator]
    return Path(objects / served.client.adapter(domain).digest)


def merged_request(domain: str, method: str = "held") -> adapter_pb2.MergeAdaptersRequest:
    weights = [mix_pb2.DomainWeight(domain=name, weight=weight) for name, weight in QA.items()]
    return adapter_pb2.MergeAdaptersRequest(
        domain=domain, mix=mix_pb2.Mix(entries=weights), method=method
    )


# What comes of it.


def test_the_sum_serves_as_the_mix_does_to_the_last_bit(served: Served, gpt2: Family) -> None:
    merged = served.client.merge("qa", QA, method="sum")
    assert merged.adapter.domain == "qa"
    assert merged.adapter.source == "ADAPTER_SOURCE_PUSHED"
    assert merged.adapter.rank == 8
    assert merged.adapter.warnings == ()
    assert merged.deviation < 1e-6
    assert 0 < merged.seconds < PATIENCE
    hashes = []
    for mix in (QA, {"qa": 1.0}):
        served.client.set(mix)
        assert served.client.mix().resident.weights == mix
        hashes.append(served.client.verify().resident_hash)
    assert hashes[0] == hashes[1]
    ids = tuple(served.runtime.texts.prompt(PROMPT))
    check_greedy(gpt2.folded(QA), ids, served.greedy({"qa": 1.0}, tokens=16))


def test_peft_loads_what_comes_out(served: Served, gpt2: Family) -> None:
    served.client.merge("qa", QA, method="svd", options={"rank": MAX_RANK})
    ids = torch.tensor([served.runtime.texts.prompt(PROMPT)])
    with torch.inference_mode():
        logits = load_peft(gpt2.model, object_of(served, "qa"))(ids).logits
        expected = gpt2.folded(QA)(ids).logits
    torch.testing.assert_close(logits, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("method", METHODS)
def test_every_method_merges_here(served: Served, method: str) -> None:
    merged = served.client.merge("all", "a=0.5,b=0.5", method=method)
    made = merged.adapter.provenance
    assert made is not None
    assert made.method == method
    assert len(served.greedy({"all": 1.0})) == 8


def test_an_adapter_says_how_it_was_merged(served: Served) -> None:
    client = served.client
    digests = {each.domain: each.digest for each in client.adapters()}
    client.merge("qa", QA, method="svd", options={"rank": 3})
    for adapter in (client.adapter("qa"), *client.adapters()[-1:]):
        made = adapter.provenance
        assert made is not None
        assert (made.method, made.options, made.weights) == ("svd", {"rank": 3}, QA)
        assert {part.domain: part.adapter_digest for part in made.parts} == {
            name: digests[name] for name in QA
        }
        change = client.changes()[-1]
        mix = format_mix(made.weights)
        assert change.what == f"merge qa {adapter.digest} method=svd rank=3 of {mix}"
    assert client.adapter("a").provenance is None


def test_one_adapter_alone_and_the_default_mix_and_named_mixes_are_merged(served: Served) -> None:
    client = served.client
    client.set({"b": 0.5, "c": -1})
    client.name_mix("half", {"b": 0.5})
    made = {
        "one": client.merge("one", "a", method="svd", options={"rank": 2}),
        "now": client.merge("now", method="sum"),
        "named": client.merge("named", "half=2,c", method="sum"),
    }
    client.unname_mix("half")
    weights = {
        name: result.adapter.provenance.weights if result.adapter.provenance else None
        for name, result in made.items()
    }
    assert weights == {
        "one": {"a": 1.0},
        "now": {"b": 0.5, "c": -1.0},
        "named": {"b": 1.0, "c": 1.0},
    }
    assert made["one"].adapter.rank == 2


def test_the_same_again_changes_nothing_and_another_replaces(served: Served, gpt2: Family) -> None:
    client = served.client
    first = client.merge("qa", QA, method="sum")
    client.set("qa")
    generation, changes = client.mix().generation, len(client.changes(1000))
    again = client.merge("qa", QA, method="sum")
    assert (again.adapter.digest, again.generation) == (first.adapter.digest, generation)
    assert len(client.changes(1000)) == changes
    with pytest.raises(AlreadyExistsError) as no:
        client.merge("qa", "a,b", method="sum")
    assert no.value.reason == "ADAPTER_EXISTS"
    replaced = client.merge("qa", "a,b", method="sum", replace=True)
    assert replaced.generation == generation + 1
    assert client.mix().entries[0].adapter_digest == replaced.adapter.digest
    ids = tuple(served.runtime.texts.prompt(PROMPT))
    check_greedy(gpt2.folded({"a": 1.0, "b": 1.0}), ids, served.greedy())


def told(client: Client) -> dict[str, AdapterInfo]:
    """What is said of each adapter, but for the size of a file that may be another name's."""
    return {
        each.domain: replace(client.adapter(each.domain), bytes=0) for each in client.adapters()
    }


def test_a_merge_survives_a_restart_with_its_provenance(
    loop: LoopThread, gpt2: Family, tmp_path: Path
) -> None:
    first = start(loop, gpt2.base, tmp_path / "state")
    gpt2.push_all(first.client)
    first.client.merge("qa", QA, method="sum")
    # The same tensors, made otherwise: the names share a file, and each has what was said of it.
    one = first.client.merge("one", "a", method="sum")
    same = first.client.merge("same", "a", method="mean")
    assert one.adapter.digest == same.adapter.digest
    assert one.adapter.provenance != same.adapter.provenance
    first.client.set("qa")
    before = told(first.client)
    first.stop()
    second = start(loop, gpt2.base, tmp_path / "state")
    after = told(second.client)
    second.stop()
    assert after == before
    assert after["qa"].provenance is not None


# Nobody is disturbed.


def test_streams_beside_merges_keep_their_tokens(served: Served, gpt2: Family) -> None:
    """Sixteen, of four mixes; merges of their own domains begin and end all the time."""
    client = served.client
    mixes = [{"a": 1.0}, QA, {"a": 0.5, "b": 0.5, "c": 0.5}, {}]
    done = threading.Event()

    def merge() -> int:
        merges = 0
        while not done.is_set():
            client.merge("m", {"a": 1, "b": 1 + merges}, method="svd", replace=True)
            merges += 1
        return merges

    with ThreadPoolExecutor(17) as pool:
        merging = pool.submit(merge)

        def stream(number: int) -> tuple[int, ...]:
            chunks = client.stream(
                PROMPT,
                mix=mixes[number % 4],
                temperature=0,
                max_new_tokens=64,
                ignore_eos=True,
            )
            return tuple(token for chunk in chunks for token in chunk.token_ids)

        texts = list(pool.map(stream, range(16)))
        done.set()
        assert merging.result(PATIENCE) > 0
    ids = tuple(served.runtime.texts.prompt(PROMPT))
    for number, text in enumerate(texts):
        assert len(text) == 64
        assert text == texts[number % 4]
    for mix, text in zip(mixes, texts, strict=False):
        check_greedy(gpt2.folded(mix), ids, text)


def test_changes_and_texts_go_on_while_a_merge_computes(served: Served, gate: Gate) -> None:
    client = served.client
    with ThreadPoolExecutor(1) as pool:
        merging = pool.submit(client.merge, "qa", QA, method="held")
        assert gate.entered.acquire(timeout=PATIENCE)
        assert client.set("b").weights == {"b": 1.0}
        assert len(served.greedy()) == 8
        assert "qa" not in {each.domain for each in client.adapters()}
        assert not merging.done()
        gate.let_go.set()
        assert merging.result(PATIENCE).adapter.domain == "qa"
    ((thread, cores),) = gate.threads
    assert (thread.startswith("merger"), cores) == (True, 1)


def test_what_is_merged_is_what_the_names_meant_when_it_was_asked_for(
    served: Served, gpt2: Family, gate: Gate
) -> None:
    client = served.client
    digest = client.adapter("b").digest
    with ThreadPoolExecutor(1) as pool:
        merging = pool.submit(client.merge, "qa", QA, method="held")
        assert gate.entered.acquire(timeout=PATIENCE)
        client.delete("b")
        gate.let_go.set()
        made = merging.result(PATIENCE).adapter.provenance
    assert made is not None
    assert {part.domain: part.adapter_digest for part in made.parts}["b"] == digest
    ids = tuple(served.runtime.texts.prompt(PROMPT))
    check_greedy(gpt2.folded(QA), ids, served.greedy({"qa": 1.0}))
    client.push("b", gpt2.adapters["b"])


# Who goes away.


def test_nothing_is_stored_for_a_client_that_goes_away(served: Served, gate: Gate) -> None:
    """One by each door while it is merged for, and one while it waits; then the next one's turn."""
    stub: Any = adapter_pb2_grpc.AdapterServiceStub(served.channel)
    asked = json.dumps({"mix": QA, "method": "held"}).encode()
    with closing(Http(served.server.http_address).connect()) as connection:
        connection.request(
            "POST", "/v1/adapters/h/merge", asked, {"Content-Type": "application/json"}
        )
        assert gate.entered.acquire(timeout=PATIENCE)
        waiting = stub.MergeAdapters.future(merged_request("w"))
        wait_until(lambda: served.runtime.merger._asked == 2, "the second waits")
        waiting.cancel()
        wait_until(lambda: served.runtime.merger._asked == 1, "the second has gone")
    wait_until(lambda: served.runtime.merger._asked == 0, "the first has gone")
    gate.let_go.set()
    stub.MergeAdapters(merged_request("later", "sum"), timeout=PATIENCE)
    gate.let_go.clear()
    running = stub.MergeAdapters.future(merged_request("g"))
    assert gate.entered.acquire(timeout=PATIENCE)
    running.cancel()
    wait_until(lambda: served.runtime.merger._asked == 0, "the third has gone")
    gate.let_go.set()
    served.client.merge("last", QA, method="sum")
    assert {each.domain for each in served.client.adapters()} == {*"abc", "later", "last"}
    # Those that had begun got no further than their first module.
    assert len(gate.modules) == 2


def test_a_client_that_goes_away_while_the_merge_is_measured_stops_that(
    served: Served, gate: Gate, monkeypatch: pytest.MonkeyPatch
) -> None:
    def held(*arguments: Any) -> Iterator[tuple[str, tuple[float, float]]]:
        for module, norms in deviation_norms(*arguments):
            gate.wait(module)
            yield module, norms

    monkeypatch.setattr(merger, "deviation_norms", held)
    stub: Any = adapter_pb2_grpc.AdapterServiceStub(served.channel)
    running = stub.MergeAdapters.future(merged_request("m", "sum"))
    assert gate.entered.acquire(timeout=PATIENCE)
    running.cancel()
    wait_until(lambda: served.runtime.merger._asked == 0, "it has gone")
    gate.let_go.set()
    last = served.client.merge("last", QA, method="sum").adapter
    assert {each.domain for each in served.client.adapters()} == {*"abc", "last"}
    assert len(gate.modules) == 1 + len(last.modules)


def test_a_server_that_ends_ends_its_merges(
    loop: LoopThread, gpt2: Family, tmp_path: Path, gate: Gate
) -> None:
    served = start(loop, gpt2.base, tmp_path / "state")
    gpt2.push_all(served.client)
    with ThreadPoolExecutor(2) as pool:
        merging = [pool.submit(served.client.merge, name, QA, method="held") for name in "mn"]
        assert gate.entered.acquire(timeout=PATIENCE)
        wait_until(lambda: served.runtime.merger._asked == 2, "the second waits")
        ending = threading.Thread(target=served.loop.run, args=(served.server.stop(PATIENCE),))
        ending.start()
        wait_until(served.runtime.merger._ending.is_set, "the server ends")
        gate.let_go.set()
        for merge in merging:
            with pytest.raises(UnavailableError) as no:
                merge.result(PATIENCE)
            assert no.value.reason == "SHUTTING_DOWN"
        ending.join()
    served._stopped = True
    served.client.close()
    served.channel.close()
    names = json.loads((tmp_path / "state" / "adapters" / "names.json").read_text())
    assert sorted(names) == ["a", "b", "c"]


def test_merges_wait_and_too_many_are_refused(
    loop: LoopThread, gpt2: Family, tmp_path: Path, gate: Gate
) -> None:
    served = start(loop, gpt2.base, tmp_path / "state", max_queue=1)
    gpt2.push_all(served.client)
    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(served.client.merge, "m", QA, method="held")
        assert gate.entered.acquire(timeout=PATIENCE)
        second = pool.submit(served.client.merge, "n", QA, method="held")
        wait_until(lambda: served.runtime.merger._asked == 2, "the second waits")
        with pytest.raises(QueueFullError) as no:
            served.client.merge("o", QA, method="sum")
        assert no.value.retry_after_seconds
        gate.let_go.set()
        assert [each.result(PATIENCE).adapter.domain for each in (first, second)] == ["m", "n"]
    served.stop()


# What is refused.

REFUSED: dict[str, tuple[dict[str, Any], type[CallError], str, str]] = {
    "no name": (
        {"domain": "../qa"},
        InvalidArgumentError,
        "INVALID_DOMAIN",
        "is not a valid name",
    ),
    "a word": ({"domain": "base"}, InvalidArgumentError, "INVALID_DOMAIN", "is reserved"),
    "the name of a mix": ({"domain": "named"}, AlreadyExistsError, "NAME_TAKEN", "a named mix"),
    "no mix": ({"mix": "base"}, InvalidArgumentError, "NOTHING_TO_MERGE", "name a domain"),
    "an unknown domain": ({"mix": "law"}, NotFoundError, "DOMAIN_NOT_FOUND", "'law'"),
    "a bad weight": ({"mix": {"a": 1e5}}, InvalidArgumentError, "INVALID_MIX", "weight of a"),
    "no method": ({"method": ""}, InvalidArgumentError, "INVALID_METHOD", "use sum, "),
    "an unknown one": ({"method": "magic"}, InvalidArgumentError, "INVALID_METHOD", "use sum, "),
    "an unknown option": (
        {"options": {"rank": 2}},
        InvalidArgumentError,
        "INVALID_METHOD",
        "sum has no option 'rank'; its options: none",
    ),
    "a value of another kind": (
        {"method": "svd", "options": {"rank": "two"}},
        InvalidArgumentError,
        "INVALID_METHOD",
        "whole number",
    ),
    "a number that may be another": (
        {"method": "svd", "options": {"rank": 2**53}},
        InvalidArgumentError,
        "INVALID_METHOD",
        "below 2^53",
    ),
    "an infinite number": (
        {"method": "svd", "options": {"rank": float("inf")}},
        InvalidArgumentError,
        "INVALID_METHOD",
        "below 2^53",
    ),
    "a list": (
        {"method": "svd", "options": {"rank": [2]}},
        InvalidArgumentError,
        "INVALID_METHOD",
        "'rank' holds no number",
    ),
    "too large a rank": (
        {"mix": "a,b,c"},
        FailedPreconditionError,
        "RANK_TOO_HIGH",
        "has rank 12, and the limit is 8: merge with method svd",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_merge_is_refused_in_one_line_and_nothing_changes(served: Served, name: str) -> None:
    given, error, reason, words = REFUSED[name]
    client = served.client
    client.name_mix("named", "b")
    before, changes = client.adapters(), client.changes(1000)
    with pytest.raises(error) as no:
        client.merge(**{"domain": "qa", "mix": QA, "method": "sum"} | given)
    assert no.value.reason == reason
    assert words in no.value.message
    assert client.adapters() == before
    assert client.changes(1000) == changes
    client.unname_mix("named")


def test_the_rank_is_refused_at_the_first_module(served: Served, gate: Gate) -> None:
    gate.let_go.set()
    with pytest.raises(FailedPreconditionError, match="--max-rank"):
        served.client.merge("all", "a,b,c", method="held")
    assert len(gate.modules) == 1


def test_the_size_is_refused_at_the_module_that_is_too_much(
    served: Served, gate: Gate, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate.let_go.set()
    limits = replace(served.runtime.adapter_limits, max_bytes=1)
    monkeypatch.setattr(served.runtime.merger, "_limits", limits)
    with pytest.raises(FailedPreconditionError, match="--max-adapter-mib") as no:
        served.client.merge("qa", QA, method="held")
    assert no.value.reason == "TOO_LARGE"
    assert len(gate.modules) == 1


def test_it_may_take_the_place_of_one_of_its_own_parts(served: Served, gpt2: Family) -> None:
    client = served.client
    client.merge("m", "a,b", method="sum")
    part = client.adapter("m").digest
    client.set("m")
    merged = client.merge("m", "m=0.5", method="sum", replace=True).adapter
    assert merged.provenance is not None
    assert [each.adapter_digest for each in merged.provenance.parts] == [part]
    assert client.mix().entries[0].adapter_digest == merged.digest != part
    ids = tuple(served.runtime.texts.prompt(PROMPT))
    check_greedy(gpt2.folded({"a": 0.5, "b": 0.5}), ids, served.greedy())


def test_what_leaves_nothing_is_refused(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    @dataclass(frozen=True)
    class Nothing(Method):
        name: ClassVar[str] = "nothing"

        def merge(self, module: str, parts: int, terms: Sequence[Term]) -> Pair:
            return terms[0].a[:0], terms[0].b[:, :0]

    monkeypatch.setitem(METHODS, "nothing", Nothing)
    with pytest.raises(FailedPreconditionError, match="nothing leaves nothing of this mix") as no:
        served.client.merge("qa", QA, method="nothing")
    assert no.value.reason == "ZERO_EFFECT"


def test_an_adapter_that_is_damaged_in_memory_is_not_merged(served: Served) -> None:
    factors = next(iter(served.runtime.registry.get("b").adapter.modules.values()))
    kept = factors.a.clone()
    bits = factors.a.view(torch.int32)
    bits[0, 0] ^= 1
    try:
        with pytest.raises(DataLossError, match="b is not what was loaded any more: restart"):
            served.client.merge("qa", QA, method="sum")
    finally:
        factors.a.copy_(kept)
    assert served.client.merge("qa", QA, method="sum").adapter.domain == "qa"

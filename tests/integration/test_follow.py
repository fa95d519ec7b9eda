"""Servers that follow one file: alone, and three of them behind a client that takes turns."""

from __future__ import annotations

import json
import re
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from tests.instants import Instants, plant
from tests.integration.harness import (
    PATIENCE,
    PROMPT,
    Family,
    LoopThread,
    Served,
    ServerProcess,
    check_greedy,
    start,
    wait_until,
)
from tests.integration.http_client import Http

from superpose_client import (
    Client,
    FailedPreconditionError,
    FollowedFile,
    HealthStatus,
    MixState,
)
from superpose_server.errors import StartupError


def write(path: Path, mix: object, **more: object) -> None:
    """Write a file at one instant, as those who are followed should."""
    fresh = path.with_suffix(".new")
    fresh.write_text(json.dumps({"mix": mix, **more}))
    fresh.replace(path)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "mixes.json"


Start = Callable[[], Served]


@pytest.fixture
def begin(loop: LoopThread, gpt2: Family, tmp_path: Path, path: Path) -> Iterator[Start]:
    """Starts servers that follow the file, looking when they are told to; on one state, in turn."""
    with ExitStack() as stack:

        def begun() -> Served:
            served = start(
                loop,
                gpt2.base,
                tmp_path / "state",
                adapter_dir=gpt2.adapters["a"].parent,
                follow=str(path),
                follow_every=3600,
                http_listen="127.0.0.1:0",
            )
            stack.callback(served.stop)
            return served

        yield begun


def look(served: Served) -> None:
    following = served.runtime.following
    assert following is not None
    following.look()


def metric(served: Served) -> float:
    with urllib.request.urlopen(f"http://{served.server.metrics_address}/metrics") as answer:
        lines = answer.read().decode().splitlines()
    (value,) = [line for line in lines if line.startswith("superpose_follow_reached ")]
    return float(value.split()[1])


def test_a_server_is_at_what_the_file_says_from_the_start_and_across_restarts(
    begin: Start, path: Path, gpt2: Family
) -> None:
    write(path, {"a": 1, "b": -0.3}, named_mixes={"qa": {"c": 0.5}})
    served = begin()
    state = served.client.mix()
    assert (state.generation, state.weights) == (1, {"a": 1.0, "b": -0.3})
    assert {each.name: each.weights for each in served.client.named_mixes()} == {"qa": {"c": 0.5}}
    text = served.client.generate(PROMPT, temperature=0, max_new_tokens=8, ignore_eos=True)
    check_greedy(
        gpt2.folded({"a": 1.0, "b": -0.3}),
        tuple(served.runtime.texts.prompt(PROMPT)),
        text.token_ids,
    )
    served.stop()

    again = begin()
    assert again.client.mix() == state  # The same file is no change.
    again.stop()

    write(path, {"b": 2})
    other = begin()
    assert (other.client.mix().generation, other.client.mix().weights) == (2, {"b": 2.0})
    assert [each.name for each in other.client.named_mixes()] == ["qa"]  # Nothing is said of them.


def test_a_change_of_the_file_is_one_change_of_the_mix(begin: Start, path: Path) -> None:
    write(path, {"a": 1})
    served = begin()
    with served.client.watch() as changes:
        assert next(changes).generation == 1
        path.write_text(json.dumps({"mix": {"a": 1.0}, "adapters": {}}, indent=4))
        look(served)  # Written otherwise, it says the same.
        write(path, {"a": 0.5, "b": 0.5, "c": 0})
        look(served)
        look(served)
        change = next(changes)
        assert (change.generation, change.weights) == (2, {"a": 0.5, "b": 0.5})
    assert served.client.mix().generation == 2
    changes_made = served.client.changes()
    assert [(each.who, each.what) for each in changes_made] == [
        ("follow", "set a=1"),
        ("follow", "set a=0.5,b=0.5"),
    ]
    assert {each.peer for each in changes_made} == {str(path)}


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda path: path.unlink(), r"it cannot be read \(No such file or directory\)"),
        (lambda path: path.write_text('{"mix": {"a": 1'), r"it is not JSON"),
        (lambda path: write(path, {"a": 1, "d": 1}), r"no adapter is loaded as 'd': push it first"),
        (lambda path: write(path, {"a": 1e4, "b": 1e5}), r"weight of b is 100000.0"),
        (
            lambda path: write(path, {"b": 1}, adapters={"b": "0" * 64}),
            r"b is adapter [0-9a-f]{12} here, which is served from --adapter-dir and is read only",
        ),
    ],
    ids=["gone", "damaged", "unknown", "weight", "digest"],
)
def test_what_cannot_be_reached_leaves_what_is_served_and_shows(
    begin: Start, path: Path, damage: Callable[[Path], Any], words: str
) -> None:
    write(path, {"a": 1, "b": 0.5}, named_mixes={"qa": {"c": 1}})
    served = begin()
    client, http = served.client, Http(served.server.http_address)
    before = served.fingerprint()
    # Where it lies is for the log and the record.
    assert client.info().followed == FollowedFile("mixes.json", True, "")
    assert metric(served) == 1
    damage(path)
    look(served)
    followed = client.info().followed
    assert followed is not None
    assert (followed.name, followed.reached) == ("mixes.json", False)
    assert re.match(words, followed.problem.removeprefix("mix: ")), followed.problem
    assert http.ask("GET", "/v1/server").json["followed"]["problem"] == followed.problem
    assert metric(served) == 0
    assert served.fingerprint() == before
    assert client.health() == HealthStatus.SERVING
    assert http.ask("GET", "/readyz").status == 200
    write(path, {"a": 1, "b": 0.25})
    look(served)
    assert client.info().followed == FollowedFile("mixes.json", True, "")
    assert client.mix().generation == before.generation + 1
    served.stop()

    damage(path)
    with pytest.raises(StartupError, match=rf"^--follow {re.escape(str(path))}: (mix: )?{words}"):
        begin()


def test_what_the_file_says_nobody_else_changes(begin: Start, path: Path, gpt2: Family) -> None:
    write(path, {"a": 1}, named_mixes={"qa": {"c": 1}})
    served = begin()
    client, http = served.client, Http(served.server.http_address)
    before = client.mix()
    for change in (
        lambda: client.add("b"),
        lambda: client.remove("a"),
        lambda: client.set("b=0.5"),
        lambda: client.set({"a": 1.0}),
        lambda: client.name_mix("new", "b"),
        lambda: client.unname_mix("qa"),
    ):
        with pytest.raises(
            FailedPreconditionError, match=r"follows mixes\.json, .*: change"
        ) as caught:
            change()
        assert caught.value.reason == "FOLLOWS_FILE"
    refused = http.ask("PUT", "/v1/mix", {"mix": {"b": 1}})
    assert (refused.status, refused.json["error"]["code"]) == (409, "FOLLOWS_FILE")
    assert client.mix() == before
    # Adapters are everybody's still.
    client.push("d", gpt2.adapters["b"])
    client.merge("e", "a,d=-0.5", method="sum")
    client.delete("e")
    with pytest.raises(FailedPreconditionError) as caught:
        client.delete("a")
    assert caught.value.reason == "ADAPTER_IN_USE"
    write(path, {"d": 1})
    look(served)
    assert client.mix().weights == {"d": 1.0}
    # Where the file says no digest, its domain is whatever was pushed last.
    pushed = client.push("d", gpt2.adapters["c"], replace=True)
    assert client.mix().generation == before.generation + 2
    assert client.mix().entries[0].adapter_digest == pushed.adapter.digest
    look(served)
    assert client.mix().generation == before.generation + 2
    # Of names this file says nothing.
    client.name_mix("new", "b")
    # And where it says one, its domain is that one.
    write(path, {"d": 1}, adapters={"d": pushed.adapter.digest})
    look(served)
    with pytest.raises(FailedPreconditionError, match="says that d is adapter") as caught:
        client.push("d", gpt2.adapters["b"], replace=True)
    assert caught.value.reason == "FOLLOWS_FILE"
    with pytest.raises(FailedPreconditionError, match="says that d is adapter"):
        client.merge("d", "a", method="sum", replace=True)


def test_a_domain_that_is_pushed_later_is_reached_then(
    begin: Start, path: Path, gpt2: Family
) -> None:
    write(path, {})
    served = begin()
    write(path, {"d": 1})
    look(served)
    assert served.client.mix().generation == 0
    served.client.push("d", gpt2.adapters["b"])
    look(served)
    assert (served.client.mix().generation, served.client.mix().weights) == (1, {"d": 1.0})


def test_what_is_pinned_comes_from_the_store_and_no_kill_leaves_a_half(
    loop: LoopThread, gpt2: Family, tmp_path: Path, path: Path
) -> None:
    store, state_dir = tmp_path / "store", tmp_path / "state"
    store.mkdir()
    other = start(loop, gpt2.base, tmp_path / "other", store=str(store))
    gpt2.push_all(other.client)
    digests = {each.domain: each.digest for each in other.client.adapters()}
    digests["a2"] = other.client.push("next", gpt2.adapters["a2"]).adapter.digest
    expected = {each: other.greedy({each: 1.0}) for each in ("a", "next")}
    other.stop()

    def follow(folder: Path) -> Served:
        return start(
            loop,
            gpt2.base,
            folder,
            store=str(store),
            follow=str(path),
            follow_every=3600,
            self_check=False,
        )

    # A new server has everything from there.
    write(path, {"a": 1}, adapters={name: digests[name] for name in ("a", "b")})
    served = follow(state_dir)
    before = served.client.mix()
    assert (before.generation, served.greedy()) == (1, expected["a"])
    assert [each.domain for each in served.client.adapters()] == ["a", "b"]
    write(path, {"a": 1}, adapters={"a": digests["a2"], "c": digests["c"]})
    instants = Instants(state_dir)
    with instants.collected():
        look(served)
        instants.next()
    after = served.client.mix()
    assert (after.generation, served.greedy()) == (2, expected["next"])
    assert [each.domain for each in served.client.adapters()] == ["a", "b", "c"]
    served.stop()

    seen = set()
    for number, instant in enumerate(instants.found):
        copy = tmp_path / f"copy-{number}"
        plant(instant.state, copy)
        again = start(loop, gpt2.base, copy, store=str(store), self_check=False)
        try:
            mix, adapter = again.client.mix(), again.client.adapter("a")
            assert again.client.verify().ok
        finally:
            again.stop()
        assert mix in (before, after)
        assert adapter.digest == mix.entries[0].adapter_digest
        seen.add(mix.generation)
        back = follow(copy)
        assert back.client.mix() == after
        assert [each.domain for each in back.client.adapters()] == ["a", "b", "c"]
        back.stop()
    assert seen == {1, 2}


def test_the_command_refuses_a_file_before_it_loads_anything(
    gpt2: Family, tmp_path: Path, path: Path
) -> None:
    path.write_text("{}")
    with ServerProcess(gpt2.base, tmp_path / "state", f"--follow={path}") as process:
        status, errors = process.wait()
    assert (status, process.ready_line) == (1, "")
    assert errors == (
        f'superpose-server: --follow {path}: it has no "mix": write {{}} for the base model\n'
    )


def test_the_command_refuses_what_it_cannot_reach_in_one_line(
    gpt2: Family, tmp_path: Path, path: Path
) -> None:
    write(path, {"nope": 1})
    with ServerProcess(
        gpt2.base, tmp_path / "state", f"--follow={path}", "--log-level=error"
    ) as process:
        status, errors = process.wait()
    assert (status, process.ready_line) == (1, "")
    assert errors.count("\n") == 1
    assert f"superpose-server: --follow {path}: no adapter is loaded as 'nope'" in errors


class Three:
    """Three servers in processes of their own, which follow one file of a URL."""

    def __init__(self, family: Family, folder: Path, path: Path) -> None:
        self._family, self._folder, self._path = family, folder, path
        self.processes = [self.begin(number) for number in range(3)]

    def begin(self, number: int, listen: str = "127.0.0.1:0") -> ServerProcess:
        return ServerProcess(
            self._family.base,
            self._folder / f"state-{number}",
            f"--adapter-dir={self._family.adapters['a'].parent}",
            f"--follow=file://{self._path}",
            "--follow-every=0.05",
            f"--listen={listen}",
        )


def generate(client: Client, mix: str | None = None) -> tuple[MixState, tuple[int, ...]]:
    made = client.generate(PROMPT, mix=mix, temperature=0, max_new_tokens=8, ignore_eos=True)
    assert made.mix is not None
    return made.mix, made.token_ids


def test_three_servers_follow_one_file_and_texts_go_on_where_one_is_killed(
    loop: LoopThread, gpt2: Family, tmp_path: Path, path: Path
) -> None:
    one, two = {"a": 1.0, "b": -0.3}, {"b": 1.0, "c": 0.5}
    alone = start(loop, gpt2.base, tmp_path / "alone", adapter_dir=gpt2.adapters["a"].parent)
    expected = {str(mix): alone.greedy(mix) for mix in (one, two)}
    prompt = tuple(alone.runtime.texts.prompt(PROMPT))
    check_greedy(gpt2.folded(one), prompt, expected[str(one)])
    check_greedy(gpt2.folded(two), prompt, expected[str(two)])
    alone.stop()
    assert len(set(expected.values())) == 2

    write(path, one, named_mixes={"qa": two})
    with ExitStack() as stack:
        three = Three(gpt2, tmp_path, path)
        processes = [stack.enter_context(each) for each in three.processes]
        addresses = [process.address for process in processes]
        clients = [stack.enter_context(process.client()) for process in processes]
        everyone = stack.enter_context(Client(",".join(addresses), timeout=PATIENCE))
        # Each was there before it was ready, and they agree.
        assert len({process.ready["digest"] for process in processes}) == 1
        assert [client.mix().weights for client in clients] == [one] * 3
        for _ in range(6):
            mix, tokens = generate(everyone)
            assert (mix.weights, tokens) == (one, expected[str(one)])
            assert generate(everyone, "qa")[1] == expected[str(two)]

        # They go where it goes.
        watches = [stack.enter_context(client.watch(timeout=PATIENCE)) for client in clients]
        assert [next(watch).generation for watch in watches] == [1, 1, 1]
        write(path, two)
        assert [next(watch).weights for watch in watches] == [two] * 3
        for _ in range(6):
            mix, tokens = generate(everyone)
            assert (mix.weights, tokens) == (two, expected[str(two)])

        # One is killed within a text of its own; texts go on.
        lasting = clients[1].stream(PROMPT, max_new_tokens=900, ignore_eos=True)
        next(lasting)
        processes[1].kill()
        for _ in range(9):
            assert generate(everyone)[1] == expected[str(two)]

        # While it is away the file changes; it comes back where the others are by then.
        write(path, one)
        assert [next(watches[number]).weights for number in (0, 2)] == [one] * 2
        back = stack.enter_context(three.begin(1, addresses[1]))
        assert back.ready["generation"] == "3"
        assert back.ready["digest"] == clients[0].mix().digest == clients[2].mix().digest
        with back.client() as client:
            counted = client.info().generated_tokens
            wait_until(
                lambda: (
                    generate(everyone)[1] == expected[str(one)]
                    and client.info().generated_tokens > counted
                ),
                "a text for the server that is back",
            )

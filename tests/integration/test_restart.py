"""What is on disk: a restart comes back with the same mix, or says in one line why it does not."""

from __future__ import annotations

import itertools
import shutil
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from tests.instants import Instants, plant
from tests.integration.harness import Family, LoopThread, Served, ServerProcess, start
from tests.state_files import stray_files

from superpose_client import Client, MixState, Provenance
from superpose_server.errors import StartupError


def entries(state: MixState) -> list[tuple[str, float, str]]:
    return [(e.domain, e.weight, e.adapter_digest) for e in state.entries]


def journal(state_dir: Path) -> Path:
    return state_dir / "mix.json"


def test_a_restart_comes_back_with_the_same_mix_and_bits(
    loop: LoopThread, gpt2: Family, tmp_path: Path
) -> None:
    first = start(loop, gpt2.base, tmp_path / "state")
    gpt2.push_all(first.client)
    first.client.set({"a": 1.0, "b": -0.3})
    first.client.push("a", gpt2.adapters["a2"], replace=True)
    state, adapters = first.client.mix(), first.client.adapters()
    bits, hashes = first.score_bits(), first.hashes()
    first.stop()

    second = start(loop, gpt2.base, tmp_path / "state")
    try:
        assert second.client.mix() == state
        assert second.client.adapters() == adapters
        assert second.score_bits() == bits
        assert second.hashes() == hashes
        assert second.client.verify().ok
        assert second.client.add("c").generation == state.generation + 1
    finally:
        second.stop()


def stopped(loop: LoopThread, family: Family, state_dir: Path) -> MixState:
    """Leave the state of a server whose default mix is a=1, b=0.5; return that mix."""
    served = start(loop, family.base, state_dir)
    family.push_all(served.client)
    state = served.client.set({"a": 1.0, "b": 0.5})
    served.stop()
    return state


def _truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-20])


def _empty(path: Path) -> None:
    path.write_bytes(b"")


def _edit(path: Path) -> None:
    path.write_text(path.read_text().replace("0.5", "0.6"))


def _renumber(path: Path) -> None:
    path.write_text(path.read_text().replace('"generation": 1', '"generation": 7'))


def _binary(path: Path) -> None:
    path.write_bytes(b"\xff\xfe\0")


@pytest.mark.parametrize("damage", [_truncate, _empty, _edit, _renumber, _binary])
def test_a_damaged_journal_is_refused_with_the_way_out(
    loop: LoopThread, gpt2: Family, tmp_path: Path, damage: Callable[[Path], None]
) -> None:
    state_dir = tmp_path / "state"
    stopped(loop, gpt2, state_dir)
    whole = journal(state_dir).read_bytes()
    damage(journal(state_dir))
    damaged = journal(state_dir).read_bytes()
    assert damaged != whole
    with pytest.raises(StartupError, match=r"journal .*/mix\.json is damaged: .*") as caught:
        start(loop, gpt2.base, state_dir)
    assert "or delete it to start from the base model" in str(caught.value)
    assert journal(state_dir).read_bytes() == damaged
    # The way out works.
    journal(state_dir).unlink()
    served = start(loop, gpt2.base, state_dir)
    try:
        assert served.client.mix().weights == {}
        assert [adapter.domain for adapter in served.client.adapters()] == ["a", "b", "c"]
    finally:
        served.stop()


def test_the_command_refuses_a_damaged_journal_in_one_line(
    loop: LoopThread, gpt2: Family, tmp_path: Path
) -> None:
    state_dir = tmp_path / "state"
    stopped(loop, gpt2, state_dir)
    _truncate(journal(state_dir))
    with ServerProcess(gpt2.base, state_dir) as process:
        status, errors = process.wait()
    assert (status, process.ready_line) == (1, "")
    assert errors.count("\n") == 1
    assert errors.startswith(f"superpose-server: journal {journal(state_dir)} is damaged: ")
    assert "delete it to start from the base model" in errors


def test_an_adapter_of_the_mix_that_is_gone_is_named(
    loop: LoopThread, gpt2: Family, tmp_path: Path
) -> None:
    state_dir, folders = tmp_path / "state", tmp_path / "adapters"
    for name in ("a", "b"):
        shutil.copytree(gpt2.adapters[name], folders / name)
    served = start(loop, gpt2.base, state_dir, adapter_dir=folders)
    state = served.client.set({"a": 1.0, "b": 0.5})
    served.stop()

    shutil.rmtree(folders / "b")
    with pytest.raises(StartupError, match=r"holds b \(adapter [0-9a-f]{12}\), which is gone"):
        start(loop, gpt2.base, state_dir, adapter_dir=folders)
    shutil.copytree(gpt2.adapters["c"], folders / "b")
    with pytest.raises(StartupError, match=r"holds b .*, which now has digest [0-9a-f]{12}"):
        start(loop, gpt2.base, state_dir, adapter_dir=folders)
    shutil.rmtree(folders / "b")
    shutil.copytree(gpt2.adapters["b"], folders / "b")
    again = start(loop, gpt2.base, state_dir, adapter_dir=folders)
    try:
        assert entries(again.client.mix()) == entries(state)
    finally:
        again.stop()


def test_the_state_of_another_base_is_refused(
    loop: LoopThread, gpt2: Family, llama: Family, tmp_path: Path
) -> None:
    stopped(loop, gpt2, tmp_path / "with-adapters")
    with pytest.raises(StartupError, match="use another --state-dir"):
        start(loop, llama.base, tmp_path / "with-adapters")
    served = start(loop, gpt2.base, tmp_path / "mix-only", adapter_dir=gpt2.adapters["a"].parent)
    served.client.add("a")
    served.stop()
    with pytest.raises(StartupError, match=r"mix\.json belongs to another base .*--state-dir"):
        start(loop, llama.base, tmp_path / "mix-only")


def test_a_second_server_on_the_same_state_is_refused(served: Served, gpt2: Family) -> None:
    state_dir = served.runtime.config.state_dir
    assert state_dir is not None
    with pytest.raises(StartupError, match=r"another server uses it: .* another --state-dir"):
        start(served.loop, gpt2.base, state_dir)
    assert served.client.add("b").weights == {"a": 1.0, "b": 1.0}


def test_a_port_that_is_taken_is_refused_and_the_state_is_free_again(
    served: Served, loop: LoopThread, gpt2: Family, tmp_path: Path
) -> None:
    state_dir = tmp_path / "other"
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        for flag in ("listen", "metrics_listen"):
            config: dict[str, Any] = {flag: address}
            with pytest.raises(StartupError, match=rf"cannot listen on {address}.*free port"):
                start(loop, gpt2.base, state_dir, **config)
    start(loop, gpt2.base, state_dir).stop()


@dataclass(frozen=True)
class Kept:
    """What a restart must bring back."""

    mix: tuple[int, str]
    adapters: dict[str, tuple[str, Provenance | None]]
    names: dict[str, dict[str, float]]


def kept(client: Client) -> Kept:
    mix = client.mix()
    return Kept(
        (mix.generation, mix.digest),
        {each.domain: (each.digest, each.provenance) for each in client.adapters()},
        {named.name: dict(named.weights) for named in client.named_mixes()},
    )


def test_the_state_at_any_instant_of_any_change_is_what_was_before_or_what_comes_after(
    loop: LoopThread, gpt2: Family, tmp_path: Path
) -> None:
    """What a kill at that instant leaves: so no moment is missed, as random kills miss some."""
    adapters = gpt2.adapters
    changes: list[Callable[[Client], object]] = [
        lambda client: client.set({"a": 1.0, "b": 0.5}),
        lambda client: client.name_mix("qa", {"b": 2.0}),
        lambda client: client.push("d", adapters["a2"]),
        lambda client: client.merge("d", "a,b=-0.5", method="sum", replace=True),
        lambda client: client.push("a", adapters["a2"], replace=True),  # in the mix
        lambda client: client.delete("c"),
        lambda client: client.unname_mix("qa"),
    ]
    state_dir = tmp_path / "state"
    served = start(loop, gpt2.base, state_dir)
    gpt2.push_all(served.client)
    points = [kept(served.client)]
    instants = Instants(state_dir)
    with instants.collected():
        for change in changes:
            change(served.client)
            points.append(kept(served.client))
            instants.next()
    served.stop()

    seen = set()
    for number, instant in enumerate(instants.found):
        copy = tmp_path / f"copy-{number}"
        plant(instant.state, copy)
        at = instant.under_way
        around = points[at : at + 2]  # What was acknowledged, and what was under way.
        again = start(loop, gpt2.base, copy, self_check=False)
        try:
            found = kept(again.client)
            assert again.client.verify().ok
        finally:
            again.stop()
        assert found in around
        assert stray_files(copy) == []
        seen.add((at, found == points[at], found == points[at + 1]))
    # Each change was caught before and after it took place.
    assert seen >= {(at, first, not first) for at in range(len(changes)) for first in (True, False)}


def test_nothing_is_ordered_by_a_wall_clock_that_jumps_back(
    loop: LoopThread, gpt2: Family, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = itertools.count()
    monkeypatch.setattr(time, "time", lambda: 2e9 - 3600 * next(asked))
    first = start(loop, gpt2.base, tmp_path / "state")
    gpt2.push_all(first.client)
    first.client.set({"a": 1.0})
    first.client.push("a", gpt2.adapters["a2"], replace=True)
    first.client.name_mix("qa", {"b": 2.0})
    state, tokens = kept(first.client), first.greedy()
    first.stop()
    assert next(asked) > 0  # The log at least has asked.

    second = start(loop, gpt2.base, tmp_path / "state")
    try:
        assert kept(second.client) == state
        assert second.greedy() == tokens
        assert second.client.add("b").generation == state.mix[0] + 1
    finally:
        second.stop()

"""A server with --store: what is pushed is in the store, and what is lost here comes back."""

from __future__ import annotations

import errno
import logging
import os
import shutil
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest
from tests.failing_store import failing
from tests.instants import watching
from tests.integration.harness import (
    PATIENCE,
    PROMPT,
    Family,
    LoopThread,
    Served,
    ServerProcess,
    start,
)

from superpose_adapters.adapter import Adapter
from superpose_adapters.bundled import MINI
from superpose_adapters.mix import BoundMix
from superpose_client import CallError, Client, FailedPreconditionError
from superpose_server.control.integrity import Integrity
from superpose_server.engine.executor import ServedBase
from superpose_server.errors import StartupError
from superpose_server.runtime import Runtime

FILES = {"adapter_config.json", "adapter_model.safetensors"}


@pytest.fixture
def store(tmp_path: Path) -> Path:
    folder = tmp_path / "store"
    folder.mkdir()
    return folder


def objects(folder: Path) -> dict[str, set[str]]:
    """The adapters in a folder, and their files."""
    return {
        path.name: {file.name for file in path.iterdir()} for path in (folder / "objects").iterdir()
    }


def copies(state_dir: Path) -> Path:
    return state_dir / "adapters" / "objects"


def test_a_server_that_lost_its_copies_serves_the_same_again(
    loop: LoopThread, gpt2: Family, tmp_path: Path, store: Path
) -> None:
    state_dir = tmp_path / "state"
    first = start(loop, gpt2.base, state_dir, store=str(store))
    gpt2.push_all(first.client)
    merged = first.client.merge("d", "a,b=-0.5", method="sum")
    first.client.set({"a": 1.0, "d": -0.3})
    first.client.delete("c")
    state, adapters, bits = first.client.mix(), first.client.adapters(), first.score_bits()
    first.stop()
    digests = {adapter.digest for adapter in adapters}
    assert merged.adapter.digest in digests
    # Nothing is removed there; here it is.
    assert len(objects(store)) == 4
    assert objects(store).items() >= dict.fromkeys(digests, FILES).items()
    assert {path.name for path in copies(state_dir).iterdir()} == digests

    shutil.rmtree(copies(state_dir))
    again = start(loop, gpt2.base, state_dir, store=str(store))
    try:
        assert again.client.mix() == state
        assert again.client.adapters() == adapters
        assert again.score_bits() == bits
        assert again.client.verify().ok
        assert {path.name for path in copies(state_dir).iterdir()} == digests
    finally:
        again.stop()


def test_a_damaged_copy_is_mended_at_the_start(
    loop: LoopThread, gpt2: Family, tmp_path: Path, store: Path, caplog: pytest.LogCaptureFixture
) -> None:
    state_dir = tmp_path / "state"
    first = start(loop, gpt2.base, state_dir, store=store.as_uri())
    gpt2.push_all(first.client)
    first.client.add("a")
    state, bits = first.client.mix(), first.score_bits()
    first.stop()
    caplog.clear()
    copy = copies(state_dir) / state.entries[0].adapter_digest / "adapter_model.safetensors"
    whole = copy.read_bytes()
    copy.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    again = start(loop, gpt2.base, state_dir, store=store.as_uri())
    try:
        assert (again.client.mix(), again.score_bits()) == (state, bits)
        assert copy.read_bytes() == whole
        told = [each.getMessage() for each in caplog.records if each.levelno >= logging.WARNING]
        assert len(told) == 1, told
        assert told[0].startswith(f"mending from {store.as_uri()}: {copy.parent}: damaged (")
    finally:
        again.stop()


def test_another_server_serves_by_digest_what_this_one_pushed(
    loop: LoopThread, gpt2: Family, tmp_path: Path, store: Path
) -> None:
    """Both run; the other one has the names, and nothing else."""
    one = start(loop, gpt2.base, tmp_path / "one", store=str(store))
    try:
        gpt2.push_all(one.client)
        names = tmp_path / "other" / "adapters" / "names.json"
        names.parent.mkdir(parents=True)
        shutil.copy(tmp_path / "one" / "adapters" / "names.json", names)
        other = start(loop, gpt2.base, tmp_path / "other", store=str(store))
        try:
            assert other.client.adapters() == one.client.adapters()
            mix = {"a": 1.0, "c": -0.5}
            assert other.score_bits(mix) == one.score_bits(mix)
        finally:
            other.stop()
    finally:
        one.stop()


def test_what_was_pushed_before_there_was_a_store_is_put_there_by_pushing_it_again(
    loop: LoopThread, gpt2: Family, tmp_path: Path, store: Path
) -> None:
    state_dir = tmp_path / "state"
    first = start(loop, gpt2.base, state_dir)
    gpt2.push_all(first.client)
    first.client.add("a")
    first.stop()
    with_store = start(loop, gpt2.base, state_dir, store=str(store))
    assert not (store / "objects").exists()
    adapters, changes = with_store.client.adapters(), with_store.client.changes()
    gpt2.push_all(with_store.client)
    assert with_store.client.changes() == changes  # Which is no change.
    state, bits = with_store.client.mix(), with_store.score_bits()
    with_store.stop()
    assert objects(store) == {adapter.digest: FILES for adapter in adapters}

    shutil.rmtree(copies(state_dir))
    again = start(loop, gpt2.base, state_dir, store=str(store))
    try:
        assert again.client.adapters() == adapters
        assert (again.client.mix(), again.score_bits()) == (state, bits)
    finally:
        again.stop()


@pytest.mark.parametrize("name", sorted(FILES))
def test_a_damaged_object_of_the_store_is_mended_by_pushing_it_again(
    loop: LoopThread, gpt2: Family, tmp_path: Path, store: Path, name: str
) -> None:
    served = start(loop, gpt2.base, tmp_path / "state", store=str(store))
    try:
        pushed = served.client.push("a", gpt2.adapters["a"])
        damaged = store / "objects" / pushed.adapter.digest / name
        whole = damaged.read_bytes()
        for spoiled in (b"", whole[:-9]):
            damaged.write_bytes(spoiled)
            assert served.client.push("a", gpt2.adapters["a"]) == pushed
            assert damaged.read_bytes() == whole
        store.rename(store.with_name("elsewhere"))
        with pytest.raises(FailedPreconditionError, match="it is not there") as caught:
            served.client.push("a", gpt2.adapters["a"])
        assert caught.value.reason == "STORE_WRITE_FAILED"
        assert [each.digest for each in served.client.adapters()] == [pushed.adapter.digest]
    finally:
        served.stop()


@pytest.mark.parametrize("write", [str, Path.as_uri])
def test_a_server_s_own_folder_of_adapters_is_no_store(
    loop: LoopThread, gpt2: Family, tmp_path: Path, write: Callable[[Path], str]
) -> None:
    """Whoever serves from it removes what it has no name for."""
    one = start(loop, gpt2.base, tmp_path / "one")
    try:
        one.client.push("a", gpt2.adapters["a"])
        url = write(tmp_path / "one" / "adapters")
        with pytest.raises(StartupError, match=rf"^--store {url} is a server's own .*: name ano"):
            start(loop, gpt2.base, tmp_path / "other", store=url)
    finally:
        one.stop()


def gone(store: Path) -> Callable[[str, Any], None]:
    store.rename(store.with_name("elsewhere"))
    return lambda event, subject: None


def read_only(store: Path) -> Callable[[str, Any], None]:
    def refuse(event: str, subject: Any) -> None:
        if str(subject).startswith(str(store)):
            raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(subject))

    return refuse


CHANGES: dict[str, Callable[[Client, Family], object]] = {
    "push": lambda client, family: client.push("d", family.adapters["a2"]),
    "replace": lambda client, family: client.push("a", family.adapters["a2"], replace=True),
    "merge": lambda client, _: client.merge("d", "b,c=-0.5", method="sum"),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize(
    ("lose", "why"),
    [(gone, r"it is not there \(No such file"), (read_only, r"it fails \(Read-only file system\)")],
)
def test_a_store_that_refuses_changes_nothing(
    loop: LoopThread,
    gpt2: Family,
    tmp_path: Path,
    store: Path,
    change: str,
    lose: Callable[[Path], Callable[[str, Any], None]],
    why: str,
    caplog: pytest.LogCaptureFixture,
) -> None:
    served = start(loop, gpt2.base, tmp_path / "state", store=str(store))
    try:
        gpt2.push_all(served.client)
        served.client.add("a")
        before = served.fingerprint(), served.client.adapters(), served.hashes()
        names = (tmp_path / "state" / "adapters" / "names.json").read_bytes()
        kept = sorted(copies(tmp_path / "state").rglob("*"))
        with watching(lose(store)), pytest.raises(FailedPreconditionError, match=why) as caught:
            CHANGES[change](served.client, gpt2)
        assert caught.value.reason == "STORE_WRITE_FAILED"
        assert "\n" not in str(caught.value)
        assert f"{store}: " in caplog.text  # The place is for the log alone.
        assert (served.fingerprint(), served.client.adapters(), served.hashes()) == before
        assert (tmp_path / "state" / "adapters" / "names.json").read_bytes() == names
        assert sorted(copies(tmp_path / "state").rglob("*")) == kept
        store.mkdir(exist_ok=True)  # It is back, and the same works.
        CHANGES[change](served.client, gpt2)
        assert served.client.verify().ok
    finally:
        served.stop()


def test_a_start_while_the_store_is_away_needs_whole_copies(
    loop: LoopThread, gpt2: Family, tmp_path: Path, store: Path, caplog: pytest.LogCaptureFixture
) -> None:
    state_dir = tmp_path / "state"
    first = start(loop, gpt2.base, state_dir, store=str(store))
    gpt2.push_all(first.client)
    adapters = first.client.adapters()
    first.stop()
    away = store.rename(tmp_path / "away")

    caplog.clear()
    again = start(loop, gpt2.base, state_dir, store=str(store))
    try:
        assert again.client.adapters() == adapters
        assert f"what is pushed is refused: {store}: it is not there" in caplog.text
        with pytest.raises(FailedPreconditionError, match="shared store"):
            again.client.push("d", gpt2.adapters["a2"])
    finally:
        again.stop()

    shutil.rmtree(copies(state_dir) / adapters[0].digest)
    with pytest.raises(StartupError, match=rf"^{store}: it is not there .*: create that folder"):
        start(loop, gpt2.base, state_dir, store=str(store))
    away.rename(store)
    start(loop, gpt2.base, state_dir, store=str(store)).stop()


class Elsewhere:
    """In the place of replicas, which read what is stored; rows run nowhere."""

    running = waiting = 0

    def __init__(self, base: ServedBase) -> None:
        self._base = base
        self.integrity = Integrity(self)
        self.intact = True
        self.resident = BoundMix(base.digest)

    def base(self, folder: Path) -> ServedBase:
        return self._base

    def keep(self, adapter: Adapter) -> None:
        pass

    def begin(self, mix: BoundMix, generation: int) -> None:
        self.resident = mix

    def stop(self) -> None:
        pass


def test_a_start_with_replicas_needs_the_store_for_what_is_not_copied(
    loop: LoopThread, gpt2: Family, tmp_path: Path, store: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """All that is served is put there for them, at every start."""
    served = start(loop, gpt2.base, tmp_path / "other")
    fleet: Any = Elsewhere(served.runtime.base)
    served.stop()
    config = replace(
        served.runtime.config,
        state_dir=tmp_path / "state",
        adapter_dir=gpt2.adapters["a"].parent,
        store=str(store),
    )
    Runtime(config, fleet=fleet).close()
    stored = objects(store)
    assert stored
    store.rename(tmp_path / "away")
    caplog.clear()
    Runtime(config, fleet=fleet).close()
    assert caplog.text.count("from copies alone") == len(stored)
    shutil.rmtree(copies(tmp_path / "state"))
    with pytest.raises(StartupError, match=rf"^{store}: it is not there"):
        Runtime(config, fleet=fleet)


def hanging() -> tuple[Callable[[str, str], None], threading.Event, threading.Event]:
    """A fault that lets writes wait, an event for the first that does, and one that lets go."""
    asked, let_go = threading.Event(), threading.Event()

    def hang(call: str, path: str) -> None:
        if call == "pipe_file":
            asked.set()
            assert let_go.wait(PATIENCE)

    return hang, asked, let_go


def served_from_memory(loop: LoopThread, gpt2: Family, tmp_path: Path) -> Served:
    served = start(loop, gpt2.base, tmp_path / "state", store=f"failing://{uuid4().hex}")
    gpt2.push_all(served.client)
    return served


def test_texts_go_on_while_a_push_waits_for_the_store(
    loop: LoopThread, gpt2: Family, tmp_path: Path
) -> None:
    served = served_from_memory(loop, gpt2, tmp_path)
    hang, asked, let_go = hanging()
    try:
        with failing(hang), ThreadPoolExecutor(2) as pool:
            push = pool.submit(served.client.push, "d", gpt2.adapters["a2"])
            assert asked.wait(PATIENCE)
            change = pool.submit(served.client.add, "b")
            # Begun and ended meanwhile.
            assert len(list(served.client.stream(PROMPT, max_new_tokens=50, ignore_eos=True))) > 1
            assert served.client.info().running == 0
            assert [adapter.domain for adapter in served.client.adapters()] == ["a", "b", "c"]
            # Changes are made one after the other.
            assert served.client.mix().weights == {}
            assert not push.done()
            assert not change.done()
            let_go.set()
            assert push.result(PATIENCE).adapter.domain == "d"
            assert change.result(PATIENCE).weights == {"b": 1.0}
    finally:
        let_go.set()
        served.stop()


def test_a_server_ends_while_a_push_waits_for_the_store(
    loop: LoopThread, gpt2: Family, tmp_path: Path
) -> None:
    served = served_from_memory(loop, gpt2, tmp_path)
    hang, asked, let_go = hanging()
    with failing(hang), ThreadPoolExecutor(1) as pool:
        try:
            push = pool.submit(served.client.push, "d", gpt2.adapters["a2"])
            assert asked.wait(PATIENCE)
            served.stop()
            assert isinstance(push.exception(PATIENCE), CallError)
            # The store still waits, and the state is free for another server all the same.
            assert not let_go.is_set()
        finally:
            let_go.set()
    url = served.runtime.config.store
    again = start(loop, gpt2.base, tmp_path / "state", store=url)
    try:
        assert [adapter.domain for adapter in again.client.adapters()] == ["a", "b", "c"]
    finally:
        again.stop()


@pytest.mark.parametrize(
    ("url", "line"),
    [
        ("s4://user:secret@place", "s4://place: its scheme s4 is unknown: use a folder, s3://"),
        ("s3://user:secret@place?secret", "s3://place: no store: name a folder, or a URL such as"),
    ],
)
def test_the_command_refuses_a_store_in_one_line_without_its_secrets(
    tmp_path: Path, url: str, line: str
) -> None:
    flags = ("--log-level=debug", "--no-self-check")
    with ServerProcess(MINI.name, tmp_path / "state", *flags, SUPERPOSE_STORE=url) as process:
        status, errors = process.wait()
    assert (status, process.ready_line) == (1, "")
    assert errors.splitlines()[-1].startswith(f"superpose-server: {line}")
    assert "secret" not in errors

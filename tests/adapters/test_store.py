from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    invariant,
    multiple,
    precondition,
    rule,
)
from tests.tiny_adapters import DIGESTS, LAYOUT, files

from superpose_adapters.adapter import AdapterError
from superpose_adapters.peft.folder import CONFIG_NAME, TENSORS_NAME
from superpose_adapters.store import AdapterStore, Named
from superpose_adapters.store_error import StoreError


def tree(folder: Path) -> dict[str, bytes]:
    """Everything that counts in a store: its files, less the lock."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != "lock"
    }


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "state" / "adapters"


def test_an_adapter_comes_back_after_a_restart(folder: Path) -> None:
    with AdapterStore(folder) as store:
        assert store.put(*files(0)) == DIGESTS[0]
        store.set_name("math", DIGESTS[0])
    with AdapterStore(folder) as store:
        assert store.names == {"math": DIGESTS[0]}
        assert store.files(DIGESTS[0]) == files(0)
        adapter = store.load(DIGESTS[0], LAYOUT)
        assert adapter.digest == DIGESTS[0]
        assert torch.equal(adapter.modules["m"].a, torch.ones(1, 3))


def test_objects_lie_under_their_digest(folder: Path) -> None:
    with AdapterStore(folder) as store:
        store.put(*files(0))
    config, tensors = files(0)
    assert tree(folder) == {
        f"objects/{DIGESTS[0]}/{CONFIG_NAME}": config,
        f"objects/{DIGESTS[0]}/{TENSORS_NAME}": tensors,
    }


def test_putting_twice_changes_nothing(folder: Path) -> None:
    with AdapterStore(folder) as store:
        store.put(*files(0))
        path = folder / "objects" / DIGESTS[0] / TENSORS_NAME
        before = path.stat()
        assert store.put(*files(0)) == DIGESTS[0]
        assert path.stat() == before


def test_what_is_said_of_an_adapter_is_kept_with_its_name(tmp_path: Path) -> None:
    with AdapterStore(tmp_path) as store:
        digest = store.put(*files(0))
        store.set_name("plain", digest)
        store.set_name("said", digest, ["one", "two"])
    with AdapterStore(tmp_path) as store:
        assert store.names == {"plain": digest, "said": digest}
        assert store.named("plain").warnings == ()
        assert store.named("said").warnings == ("one", "two")
        with pytest.raises(KeyError):
            store.named("gone")
        store.set_name("said", digest)
        assert store.named("said").warnings == ()


def test_a_name_needs_a_stored_adapter_and_a_valid_domain(folder: Path) -> None:
    with AdapterStore(folder) as store:
        for digest in (DIGESTS[0], "", "../objects", "x" * 64):
            with pytest.raises(KeyError):
                store.set_name("math", digest)
            with pytest.raises(KeyError):
                store.files(digest)
        store.put(*files(0))
        with pytest.raises(ValueError, match="not a valid name"):
            store.set_name("../math", DIGESTS[0])
        with pytest.raises(KeyError):
            store.delete_name("math")
        assert store.names == {}


def test_a_replaced_adapter_stays_until_it_is_collected(folder: Path) -> None:
    with AdapterStore(folder) as store:
        for seed in (0, 1, 2):
            store.put(*files(seed))
        store.set_name("math", DIGESTS[0])
        store.set_name("math", DIGESTS[1])
        assert store.files(DIGESTS[0]) == files(0)
        assert store.collect(in_use={DIGESTS[2]}) == [DIGESTS[0]]
        assert [d in store for d in DIGESTS] == [False, True, True, False]
        assert store.collect(in_use=()) == [DIGESTS[2]]
        assert store.collect(in_use=()) == []


def test_what_is_no_adapter_is_not_stored(folder: Path) -> None:
    with AdapterStore(folder) as store:
        with pytest.raises(AdapterError):
            store.put(b"{}", files(0)[1])
        with pytest.raises(AdapterError):
            store.put(files(0)[0], b"")
    assert tree(folder) == {}


@pytest.mark.parametrize("name", [CONFIG_NAME, TENSORS_NAME])
@pytest.mark.parametrize("damage", ["flip", "truncate", "remove"])
def test_a_damaged_object_is_an_error_that_names_it_and_a_push_mends_it(
    folder: Path, name: str, damage: str
) -> None:
    with AdapterStore(folder) as store:
        store.put(*files(0))
        store.set_name("math", DIGESTS[0])
    path = folder / "objects" / DIGESTS[0] / name
    data = path.read_bytes()
    if damage == "flip":
        spoiled = data.replace(b'"lora_alpha": 1', b'"lora_alpha": 3')
        path.write_bytes(spoiled if spoiled != data else data[:-1] + bytes([data[-1] ^ 1]))
    elif damage == "truncate":
        path.write_bytes(data[:-1])
    else:
        path.unlink()
    with AdapterStore(folder) as store:
        with pytest.raises(StoreError, match=rf"{DIGESTS[0]}: damaged .*push again") as caught:
            store.load(DIGESTS[0], LAYOUT)
        assert "\n" not in str(caught.value)
        assert store.put(*files(0)) == DIGESTS[0]
        assert store.files(DIGESTS[0]) == files(0)


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("", "not JSON"),
        ("[]", "not an object"),
        ('{"math": 3}', "math: names no adapter"),
        ('{"math": []}', "math: names no adapter"),
        (f'{{"math": ["{DIGESTS[0]}", 3]}}', "math: has warnings that are no texts"),
        (f'{{"math": "{DIGESTS[1]}"}}', "names an adapter that is not stored"),
        (f'{{"../x": "{DIGESTS[0]}"}}', "not a valid name"),
    ],
)
def test_damaged_names_are_a_refusal_to_open(folder: Path, text: str, why: str) -> None:
    with AdapterStore(folder) as store:
        store.put(*files(0))
    (folder / "names.json").write_text(text)
    with pytest.raises(StoreError, match=rf"names\.json: damaged .*{why}"):
        AdapterStore(folder)
    (folder / "names.json").unlink()
    AdapterStore(folder).close()  # the refusal held no lock


def test_a_folder_that_cannot_be_made_is_a_clear_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(StoreError, match=r"file/store: cannot write \(Not a directory\)"):
        AdapterStore(tmp_path / "file" / "store")


def test_leftovers_of_a_crash_are_removed(folder: Path) -> None:
    with AdapterStore(folder) as store:
        store.put(*files(0))
    before = tree(folder)
    leftover = folder / "temporary" / DIGESTS[1]
    leftover.mkdir(parents=True)
    (leftover / CONFIG_NAME).write_bytes(b"half")
    (folder / "temporary" / "names.json").write_bytes(b"{")
    with AdapterStore(folder) as store:
        assert DIGESTS[1] not in store
        assert tree(folder) == before


def test_a_second_opening_is_refused_until_the_first_ends(folder: Path) -> None:
    script = (
        "import sys; from pathlib import Path; from superpose_adapters.store import AdapterStore\n"
        "AdapterStore(Path(sys.argv[1]))\n"
    )
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    with AdapterStore(folder):
        with pytest.raises(StoreError, match="another server uses it"):
            AdapterStore(folder)
        other = subprocess.run(
            [sys.executable, "-c", script, str(folder)],
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )
        assert other.returncode == 1
        assert "StoreError" in other.stderr
        assert "another server uses it" in other.stderr
    AdapterStore(folder).close()


def test_a_killed_holder_lets_go_and_the_lock_file_stays(folder: Path) -> None:
    script = (
        "import sys; from pathlib import Path; from superpose_adapters.store import AdapterStore\n"
        "store = AdapterStore(Path(sys.argv[1])); print(flush=True); sys.stdin.read()\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", script, str(folder)],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(p for p in sys.path if p)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    ) as holder:
        assert holder.stdout is not None
        holder.stdout.readline()
        with pytest.raises(StoreError, match="another server uses it"):
            AdapterStore(folder)
        before = (folder / "lock").stat().st_ino
        holder.kill()
    AdapterStore(folder).close()
    # Whoever waits for a lock that was removed holds another one than who comes next.
    assert (folder / "lock").stat().st_ino == before


class Fault:
    """Lets the n-th call of each kind of durable step fail as on a full disk."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, fail_at: int) -> None:
        self.calls = 0
        self.fail_at = fail_at
        for owner, name in [
            (os, "fsync"),
            (Path, "replace"),
            (Path, "rename"),
            (Path, "mkdir"),
        ]:
            self.wrap(monkeypatch, owner, name)

    def wrap(self, monkeypatch: pytest.MonkeyPatch, owner: Any, name: str) -> None:
        original = getattr(owner, name)

        def step(*arguments: Any, **options: Any) -> Any:
            self.calls += 1
            if self.calls == self.fail_at:
                raise OSError(errno.ENOSPC, "No space left on device")
            return original(*arguments, **options)

        monkeypatch.setattr(owner, name, step)


@pytest.mark.parametrize("fail_at", range(1, 13))
def test_a_full_disk_leaves_the_old_state(
    folder: Path, monkeypatch: pytest.MonkeyPatch, fail_at: int
) -> None:
    with AdapterStore(folder) as store:
        store.put(*files(0))
        store.set_name("math", DIGESTS[0])
        names = tree(folder)["names.json"]
        with monkeypatch.context() as patch:
            fault = Fault(patch, fail_at)
            try:
                store.put(*files(1))
                store.set_name("math", DIGESTS[1])
            except StoreError as error:
                assert "No space left on device): free space" in str(error)  # noqa: PT017
                assert fault.calls >= fail_at
                failed = True
            else:
                failed = False
        # put takes 6 durable steps and set_name 4; beyond them nothing is left to fail.
        assert failed == (fail_at <= 10)
        expected = DIGESTS[0] if failed else DIGESTS[1]
        assert store.names == {"math": expected}
        if failed:
            assert tree(folder)["names.json"] == names
            assert not any(key.startswith("temporary") for key in tree(folder))
    with AdapterStore(folder) as store:
        assert store.names == {"math": expected}
        assert store.files(expected) == files(DIGESTS.index(expected))
        for digest in DIGESTS[:2]:
            if digest in store:
                store.files(digest)  # whole
        store.set_name("math", store.put(*files(1)))  # and it works again
        assert store.names == {"math": DIGESTS[1]}


def test_a_first_name_that_is_not_durable_is_no_name(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with AdapterStore(folder) as store:
        store.put(*files(0))
        with monkeypatch.context() as patch:
            Fault(patch, fail_at=3)  # the directory, after the rename
            with pytest.raises(StoreError):
                store.set_name("math", DIGESTS[0])
        assert store.names == {}
        assert not (folder / "names.json").exists()


def test_names_that_are_given_while_something_is_done_go_with_it_if_it_fails(folder: Path) -> None:
    with AdapterStore(folder) as store:
        old, new = (store.put(*files(seed)) for seed in (0, 1))
        store.set_name("math", old, ["said"])
        named = {"math": Named(new), "law": Named(new, ("warned",))}

        def fail() -> None:
            with store.naming(named):
                assert json.loads(tree(folder)["names.json"])["math"] == new
                raise ZeroDivisionError

        with pytest.raises(ZeroDivisionError):
            fail()
        assert json.loads(tree(folder)["names.json"]) == {"math": [old, "said"]}
        assert store.names == {"math": old}
        assert store.named("math") == Named(old, ("said",))
        with store.naming(named):
            pass
    with AdapterStore(folder) as store:
        assert store.names == {"math": new, "law": new}
        assert store.named("law") == named["law"]


class StoreAgainstDict(RuleBasedStateMachine):
    """The store, reopened at any time, against two plain dicts."""

    digests: Bundle[str] = Bundle("digests")

    def __init__(self) -> None:
        super().__init__()
        self.folder = Path(tempfile.mkdtemp())
        self.store = AdapterStore(self.folder)
        self.names: dict[str, str] = {}
        self.objects: dict[str, tuple[bytes, bytes]] = {}

    def teardown(self) -> None:
        self.store.close()
        shutil.rmtree(self.folder)

    @rule(target=digests, seed=st.integers(0, 3))
    def put(self, seed: int) -> Any:
        digest = self.store.put(*files(seed))
        assert digest == DIGESTS[seed]
        self.objects[digest] = files(seed)
        return multiple(digest)

    @rule(digest=digests, domain=st.sampled_from("abc"))
    def set_name(self, digest: str, domain: str) -> None:
        if digest in self.objects:
            self.store.set_name(domain, digest)
            self.names[domain] = digest
        else:
            with pytest.raises(KeyError):
                self.store.set_name(domain, digest)

    @rule(domain=st.sampled_from("abc"))
    def delete_name(self, domain: str) -> None:
        if domain in self.names:
            self.store.delete_name(domain)
            del self.names[domain]
        else:
            with pytest.raises(KeyError):
                self.store.delete_name(domain)

    @rule(in_use=st.sets(st.sampled_from(DIGESTS), max_size=2))
    def collect(self, in_use: set[str]) -> None:
        removed = self.objects.keys() - in_use - set(self.names.values())
        assert self.store.collect(in_use) == sorted(removed)
        for digest in removed:
            del self.objects[digest]

    @precondition(lambda self: self.objects)
    @rule()
    def reopen(self) -> None:
        self.store.close()
        self.store = AdapterStore(self.folder)

    @invariant()
    def agrees(self) -> None:
        assert self.store.names == self.names
        for digest in DIGESTS:
            assert (digest in self.store) == (digest in self.objects)
            if digest in self.objects:
                assert self.store.files(digest) == self.objects[digest]


TestStoreAgainstDict = StoreAgainstDict.TestCase
TestStoreAgainstDict.settings = settings(max_examples=30, stateful_step_count=15, deadline=None)

"""Copies of a shared store: the exact bytes whatever becomes of a copy, or an error by name."""

from __future__ import annotations

import errno
import logging
import random
import shutil
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule
from tests.failing_store import failing
from tests.full_disk import files_of_at_most
from tests.tiny_adapters import DIGESTS, LAYOUT, files

from superpose_adapters.cached_objects import CachedObjects
from superpose_adapters.objects import Objects
from superpose_adapters.peft.folder import CONFIG_NAME, TENSORS_NAME
from superpose_adapters.shared_objects import SharedObjects, SharedStoreError
from superpose_adapters.store import AdapterStore
from superpose_adapters.store_error import StoreError


@pytest.fixture
def url() -> str:
    return f"failing://{uuid4().hex}"


def away() -> AbstractContextManager[None]:
    """Let no store answer."""

    def refuse(call: str, path: str) -> None:
        raise ConnectionRefusedError(errno.ECONNREFUSED, "secret")

    return failing(refuse)


def cached(folder: Path, url: str) -> CachedObjects:
    return CachedObjects(Objects(folder), SharedObjects(url))


def test_what_was_read_once_is_read_without_the_store(tmp_path: Path, url: str) -> None:
    cached(tmp_path / "one", url).put(*files(0))
    reader = cached(tmp_path / "other", url)
    assert DIGESTS[0] in reader
    assert DIGESTS[1] not in reader
    with away(), pytest.raises(SharedStoreError, match="Connection refused"):
        reader.files(DIGESTS[0])
    assert reader.files(DIGESTS[0]) == files(0)
    with away():
        assert DIGESTS[0] in reader
        assert reader.files(DIGESTS[0]) == files(0)
        with pytest.raises(SharedStoreError, match="Connection refused"):
            DIGESTS[1] in reader  # noqa: B015  # asks
    with pytest.raises(KeyError):
        reader.files(DIGESTS[1])


def test_a_damaged_copy_is_fetched_again_with_one_line(
    tmp_path: Path, url: str, caplog: pytest.LogCaptureFixture
) -> None:
    objects = cached(tmp_path, url)
    objects.put(*files(0))
    copy = tmp_path / "objects" / DIGESTS[0] / TENSORS_NAME
    for damage in (copy.unlink, lambda: copy.write_bytes(files(1)[1])):
        damage()
        caplog.clear()
        assert objects.files(DIGESTS[0]) == files(0)
        assert copy.read_bytes() == files(0)[1]
        assert [record.levelno for record in caplog.records] == [logging.WARNING]
        assert f"mending from {url}: " in caplog.text
        assert DIGESTS[0] in caplog.text
        assert objects.files(DIGESTS[0]) == files(0)
        assert len(caplog.records) == 1


def test_a_damaged_copy_that_the_store_has_not_is_named(tmp_path: Path, url: str) -> None:
    """As where the server was given a store later: it was never put there."""
    Objects(tmp_path).put(*files(0))
    (tmp_path / "objects" / DIGESTS[0] / CONFIG_NAME).write_bytes(b"")
    with pytest.raises(StoreError, match=rf"{tmp_path}.*{DIGESTS[0]}: damaged"):
        cached(tmp_path, url).files(DIGESTS[0])


def test_a_put_that_the_store_refuses_leaves_nothing_here(tmp_path: Path, url: str) -> None:
    objects = cached(tmp_path, url)
    with away(), pytest.raises(SharedStoreError, match="Connection refused"):
        objects.put(*files(0))
    assert list(tmp_path.rglob("*")) == []


def test_a_full_disk_here_refuses_a_put_and_no_read(
    tmp_path: Path, url: str, caplog: pytest.LogCaptureFixture
) -> None:
    objects = cached(tmp_path, url)
    with files_of_at_most(100):
        with pytest.raises(StoreError, match="cannot write"):
            objects.put(*files(0))
        assert objects.files(DIGESTS[0]) == files(0)
    assert f"no copy of {DIGESTS[0]} is kept: {tmp_path}: cannot write" in caplog.text
    assert objects.files(DIGESTS[0]) == files(0)
    with away():
        assert objects.files(DIGESTS[0]) == files(0)


def test_copies_are_collected_and_the_store_keeps_its_objects(tmp_path: Path, url: str) -> None:
    objects = cached(tmp_path, url)
    for seed in (0, 1):
        objects.put(*files(seed))
    assert objects.collect({DIGESTS[1]}) == [DIGESTS[0]]
    assert [path.name for path in (tmp_path / "objects").iterdir()] == [DIGESTS[1]]
    assert objects.files(DIGESTS[0]) == files(0)


def test_what_one_server_puts_another_names_and_serves(tmp_path: Path, url: str) -> None:
    with AdapterStore(tmp_path / "one", SharedObjects(url)) as one:
        one.set_name("math", one.put(*files(0)))
    with AdapterStore(tmp_path / "other", SharedObjects(url)) as other:
        assert other.names == {}  # Names are each server's own.
        other.set_name("law", DIGESTS[0])
        assert other.load(DIGESTS[0], LAYOUT).digest == DIGESTS[0]
        other.delete_name("law")
        assert other.collect(in_use=()) == [DIGESTS[0]]
    shutil.rmtree(tmp_path / "one" / "objects")
    with AdapterStore(tmp_path / "one", SharedObjects(url)) as one:
        assert one.names == {"math": DIGESTS[0]}
        assert one.files(DIGESTS[0]) == files(0)


def test_names_of_what_is_nowhere_are_a_refusal_to_open(tmp_path: Path, url: str) -> None:
    with AdapterStore(tmp_path) as store:
        store.set_name("math", store.put(*files(0)))
    shutil.rmtree(tmp_path / "objects")
    with pytest.raises(StoreError, match=rf"math names .* that is not stored, here or in {url}"):
        AdapterStore(tmp_path, SharedObjects(url))
    with away(), pytest.raises(SharedStoreError, match="Connection refused"):
        AdapterStore(tmp_path, SharedObjects(url))
    SharedObjects(url).put(*files(0))
    AdapterStore(tmp_path, SharedObjects(url)).close()  # No refusal held the lock.


def test_one_folder_of_copies_serves_many_at_a_time(tmp_path: Path, url: str) -> None:
    SharedObjects(url).put(*files(0))

    def act() -> None:
        objects = cached(tmp_path, url)
        for _ in range(10):
            assert objects.files(DIGESTS[0]) == files(0)
            assert objects.put(*files(1)) == DIGESTS[1]
            assert objects.files(DIGESTS[1]) == files(1)

    with ThreadPoolExecutor(4) as pool:
        for done in [pool.submit(act) for _ in range(4)]:
            done.result()
    assert sorted(path.name for path in (tmp_path / "objects").iterdir()) == sorted(DIGESTS[:2])
    assert list((tmp_path / "temporary").iterdir()) == []


SEEDS = st.integers(0, 3)


class AnyOrder(RuleBasedStateMachine):
    """Puts, reads, damage and faults in any order, against what was acknowledged."""

    def __init__(self) -> None:
        super().__init__()
        self.folder = Path(tempfile.mkdtemp())
        self.url = f"failing://{uuid4().hex}"
        self.objects = cached(self.folder, self.url)
        self.stored: set[int] = set()  # By a put that returned.
        self.tried: set[int] = set()

    def teardown(self) -> None:
        shutil.rmtree(self.folder)

    def faults(self, chance: float, seed: int) -> AbstractContextManager[None]:
        """Let each call of the store fail with this chance, before or after its effect."""
        draw = random.Random(seed)

        def fault(call: str, path: str) -> None:
            if draw.random() < chance:
                raise draw.choice(
                    [OSError(errno.EIO, "x"), TimeoutError(), PermissionError(), RuntimeError()]
                )

        return failing(fault)

    @rule(seed=SEEDS, chance=st.sampled_from([0.0, 0.3, 1.0]), faults=st.integers(0, 99))
    def put(self, seed: int, chance: float, faults: int) -> None:
        self.tried.add(seed)
        with self.faults(chance, faults):
            try:
                assert self.objects.put(*files(seed)) == DIGESTS[seed]
            except SharedStoreError:
                assert chance > 0
            else:
                self.stored.add(seed)

    @rule(seed=SEEDS, chance=st.sampled_from([0.0, 0.3, 1.0]), faults=st.integers(0, 99))
    def read(self, seed: int, chance: float, faults: int) -> None:
        with self.faults(chance, faults):
            try:
                assert self.objects.files(DIGESTS[seed]) == files(seed)
            except SharedStoreError:
                assert chance > 0
            except KeyError:
                assert seed not in self.stored
            else:
                assert seed in self.tried

    @rule(seed=SEEDS, change=st.data())
    def damage_the_copy(self, seed: int, change: st.DataObject) -> None:
        folder = self.folder / "objects" / DIGESTS[seed]
        if not folder.exists():
            return
        damages: list[Callable[[Path], Any]] = [
            lambda path: path.unlink(missing_ok=True),
            lambda path: path.write_bytes(b""),
            lambda path: path.write_bytes(files((seed + 1) % 4)[path.name == TENSORS_NAME][:-9]),
            lambda path: path.write_bytes(files((seed + 1) % 4)[1]),
        ]
        name = change.draw(st.sampled_from([CONFIG_NAME, TENSORS_NAME]))
        change.draw(st.sampled_from(damages))(folder / name)

    @rule(keep=st.sets(SEEDS))
    def collect(self, keep: set[int]) -> None:
        self.objects.collect({DIGESTS[seed] for seed in keep})

    @rule()
    def open_anew(self) -> None:
        self.objects = cached(self.folder, self.url)

    @rule()
    def lose_the_copies(self) -> None:
        shutil.rmtree(self.folder / "objects", ignore_errors=True)

    @invariant()
    def what_was_acknowledged_can_be_read_by_others(self) -> None:
        with tempfile.TemporaryDirectory() as folder:
            other = cached(Path(folder), self.url)
            for seed in self.stored:
                assert DIGESTS[seed] in other
                assert other.files(DIGESTS[seed]) == files(seed)


TestAnyOrder = AnyOrder.TestCase
TestAnyOrder.settings = settings(max_examples=30, stateful_step_count=15, deadline=None)

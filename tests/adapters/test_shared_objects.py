"""A shared store: adapters under their digest, whole or not there; one line for each fault."""

from __future__ import annotations

import errno
import logging
import sys
import threading
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from uuid import uuid4

import fsspec
import pytest
from tests.failing_store import failing
from tests.full_disk import files_of_at_most
from tests.instants import watching
from tests.tiny_adapters import DIGESTS, files

from superpose_adapters import shared_objects
from superpose_adapters.adapter import AdapterError
from superpose_adapters.peft.folder import CONFIG_NAME, TENSORS_NAME
from superpose_adapters.shared_objects import SharedObjectDamaged, SharedObjects, SharedStoreError

KINDS = ("folder", "file", "memory", "failing")


@pytest.fixture(params=KINDS)
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """A store of each kind, empty and of its own."""
    if request.param in ("memory", "failing"):
        return f"{request.param}://{uuid4().hex}/below"
    (tmp_path / "store").mkdir()
    return f"{'file://' * (request.param == 'file')}{tmp_path / 'store'}"


def read(url: str, digest: str, name: str) -> bytes:
    """Read a file of a store without any of the product's code."""
    with fsspec.open(f"{url}/objects/{digest}/{name}", "rb") as file:
        data: bytes = file.read()
    return data


def write(url: str, digest: str, name: str, data: bytes) -> None:
    with fsspec.open(f"{url}/objects/{digest}/{name}", "wb") as file:
        file.write(data)


def remove(url: str, digest: str, name: str) -> None:
    fs, path = fsspec.core.url_to_fs(f"{url}/objects/{digest}/{name}")
    fs.rm(path)


def line(error: pytest.ExceptionInfo[SharedStoreError], url: str) -> str:
    """The line of an error, which says where."""
    text = str(error.value)
    assert url in text
    assert "\n" not in text
    assert error.value.why in text
    return text


def test_what_one_puts_another_reads_and_it_lies_where_the_docs_say(url: str) -> None:
    one, other = SharedObjects(url), SharedObjects(f"{url}/")
    assert DIGESTS[0] not in other
    with pytest.raises(KeyError, match=DIGESTS[0]):
        other.files(DIGESTS[0])
    assert one.put(*files(0)) == DIGESTS[0]
    assert DIGESTS[0] in other
    assert DIGESTS[1] not in other
    assert other.files(DIGESTS[0]) == files(0)
    assert read(url, DIGESTS[0], CONFIG_NAME) == files(0)[0]
    assert read(url, DIGESTS[0], TENSORS_NAME) == files(0)[1]
    assert one.put(*files(0)) == DIGESTS[0]
    assert other.files(DIGESTS[0]) == files(0)


def test_what_is_no_digest_is_never_asked_for(url: str) -> None:
    shared = SharedObjects(url)
    for digest in ("", "../objects", "x" * 64, DIGESTS[0].upper(), 3):
        assert digest not in shared
    with pytest.raises(KeyError):
        shared.files("../objects")


def test_what_is_no_adapter_is_not_stored(url: str) -> None:
    with pytest.raises(AdapterError):
        SharedObjects(url).put(b"{}", files(0)[1])
    fs, path = fsspec.core.url_to_fs(url)
    assert not fs.exists(f"{path}/objects")


@pytest.mark.parametrize("name", [CONFIG_NAME, TENSORS_NAME])
@pytest.mark.parametrize("damage", ["flip", "truncate", "empty"])
def test_a_damaged_object_is_an_error_and_a_put_mends_it(url: str, name: str, damage: str) -> None:
    shared = SharedObjects(url)
    shared.put(*files(0))
    data = read(url, DIGESTS[0], name)
    spoiled = {
        "flip": data.replace(b'"lora_alpha": 1', b'"lora_alpha": 3')
        if name == CONFIG_NAME
        else data[:-1] + bytes([data[-1] ^ 1]),
        "truncate": data[:-1],
        "empty": b"",
    }[damage]
    assert spoiled != data
    write(url, DIGESTS[0], name, spoiled)
    with pytest.raises(SharedObjectDamaged, match=r"damaged \(.*\): .* push the adapter") as caught:
        shared.files(DIGESTS[0])
    assert DIGESTS[0] in line(caught, url)
    assert shared.put(*files(0)) == DIGESTS[0]
    assert shared.files(DIGESTS[0]) == files(0)


def test_an_object_of_another_digest_is_damaged(url: str) -> None:
    shared = SharedObjects(url)
    for seed in (0, 1):
        shared.put(*files(seed))
    write(url, DIGESTS[0], TENSORS_NAME, files(1)[1])
    with pytest.raises(SharedStoreError, match=f"its contents have the digest {DIGESTS[1]}"):
        shared.files(DIGESTS[0])


def test_tensors_that_are_missing_are_damage(url: str) -> None:
    shared = SharedObjects(url)
    shared.put(*files(0))
    remove(url, DIGESTS[0], TENSORS_NAME)
    with pytest.raises(SharedStoreError, match=rf"damaged \({TENSORS_NAME} is missing\)"):
        shared.files(DIGESTS[0])


@pytest.mark.parametrize("failing_at", [1, 2])
def test_a_put_that_is_cut_short_is_no_object(failing_at: int) -> None:
    url = f"failing://{uuid4().hex}"
    shared, calls = SharedObjects(url), []

    def cut(call: str, path: str) -> None:
        if call == "pipe_file":
            calls.append(path)
            if len(calls) == failing_at:
                raise OSError(errno.EIO, "secret detail")

    with failing(cut), pytest.raises(SharedStoreError, match="it fails") as caught:
        shared.put(*files(0))
    assert "secret" not in line(caught, url)
    assert DIGESTS[0] not in shared
    with pytest.raises(KeyError):
        shared.files(DIGESTS[0])
    shared.put(*files(0))
    assert shared.files(DIGESTS[0]) == files(0)


def test_a_folder_that_is_not_there_is_never_made(tmp_path: Path) -> None:
    """It may be where a disk of many machines is mounted, and is not now."""
    for folder in (tmp_path / "gone", tmp_path / "file" / "below"):
        (tmp_path / "file").write_text("x")
        shared = SharedObjects(str(folder))
        for ask in (
            lambda shared=shared: shared.put(*files(0)),
            lambda shared=shared: shared.files(DIGESTS[0]),
            lambda shared=shared: DIGESTS[0] in shared,
        ):
            with pytest.raises(SharedStoreError, match=r"it is not there .*create") as caught:
                ask()
            line(caught, str(folder))
        assert not folder.exists()


def test_a_folder_with_no_space_refuses_and_keeps_what_it_has(tmp_path: Path) -> None:
    shared = SharedObjects(str(tmp_path))
    shared.put(*files(0))
    before = sorted(tmp_path.rglob("*"))
    with files_of_at_most(100), pytest.raises(SharedStoreError, match=r"it fails .*too large"):
        shared.put(*files(1))
    assert sorted(tmp_path.rglob("*")) == before
    assert shared.files(DIGESTS[0]) == files(0)


def test_a_folder_may_be_relative_or_below_home(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a::b").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    SharedObjects("a::b").put(*files(0))
    monkeypatch.chdir("/")
    assert SharedObjects("~/a::b").files(DIGESTS[0]) == files(0)
    assert SharedObjects(f"{tmp_path}/a::b").files(DIGESTS[0]) == files(0)


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("", "an empty URL: no store: name a folder"),
        ("s3://bucket/x?versionId=3", "s3://bucket/x: no store: .*without a query"),
        ("simplecache::s3://bucket", "simplecache::s3://bucket: no store: .*without ::"),
        ("s4://bucket", r"s4://bucket: its scheme s4 is unknown: use a folder, s3://"),
    ],
)
def test_urls_that_mean_nothing_are_told_at_once(url: str, said: str) -> None:
    with pytest.raises(SharedStoreError, match=f"^{said}"):
        SharedObjects(url)


@pytest.mark.parametrize(("scheme", "package"), [("s3", "s3fs"), ("gs", "gcsfs")])
def test_a_package_that_is_missing_is_named(
    scheme: str, package: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    # As in a process that has not imported it yet.
    monkeypatch.delitem(sys.modules["fsspec.registry"]._registry, scheme, raising=False)
    with pytest.raises(SharedStoreError, match=f"{scheme}://bucket: .*: pip install {package}$"):
        SharedObjects(f"{scheme}://bucket")


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (PermissionError("secret"), r"access is denied \(PermissionError\): check the credentials"),
        (PermissionError(errno.EACCES, "secret"), r"access is denied \(Permission denied\)"),
        (type("NoCredentialsError", (Exception,), {})("secret"), "access is denied"),
        (OSError(errno.ENOSPC, "secret"), r"it fails \(No space left on device\)"),
        (ConnectionResetError(errno.ECONNRESET, "secret"), r"it fails \(Connection reset by peer"),
        (fsspec.exceptions.FSTimeoutError("secret"), "no answer within 30 s: check that it is up"),
        (OSError("secret", "secret"), r"it fails \(OSError\)"),
        (NotImplementedError("secret"), r"it fails \(NotImplementedError\)"),
        (KeyError("secret"), r"it fails \(KeyError\)"),
        (RuntimeError("secret\nhttps://user:secret@host/?X-Amz-Signature=secret"), "RuntimeError"),
    ],
)
def test_what_a_library_says_is_not_repeated(error: Exception, said: str) -> None:
    """It may hold what nobody shall read: neither in the line nor in a trace of it."""
    url = f"failing://user:secret@{uuid4().hex}/below"
    shared = SharedObjects(url)
    assert "secret" not in shared.url

    def refuse(call: str, path: str) -> None:
        raise error

    for ask in (
        lambda: shared.put(*files(0)),
        lambda: shared.files(DIGESTS[0]),
        lambda: DIGESTS[0] in shared,
    ):
        with failing(refuse), pytest.raises(SharedStoreError, match=said) as caught:
            ask()
        line(caught, shared.url)
        assert "secret" not in str(caught.value)
        assert caught.value.__cause__ is None
        assert caught.value.__context__ is None


def test_a_store_that_does_not_answer_is_given_up_in_time() -> None:
    url, let_go = f"failing://{uuid4().hex}", threading.Event()
    shared = SharedObjects(url, patience=0.05)
    asked = threading.Semaphore(0)

    def hang(call: str, path: str) -> None:
        asked.release()
        let_go.wait()

    with failing(hang):
        # Later ones do not even ask, while so many wait.
        for _ in range(6):
            with pytest.raises(SharedStoreError, match=r"no answer within 0\.05 s: check") as said:
                DIGESTS[0] in shared  # noqa: B015  # asks
            line(said, url)
        assert sum(asked.acquire(blocking=False) for _ in range(9)) == 4
        let_go.set()
    shared = SharedObjects(url)
    assert DIGESTS[0] not in shared


def test_who_waits_is_let_go_when_the_store_is_given_up() -> None:
    shared, let_go = SharedObjects(f"failing://{uuid4().hex}"), threading.Event()
    asked, said = threading.Event(), []

    def hang(call: str, path: str) -> None:
        asked.set()
        let_go.wait()

    def put() -> None:
        with pytest.raises(SharedStoreError) as caught:
            shared.put(*files(0))
        said.append(str(caught.value))

    with failing(hang):
        waiting = threading.Thread(target=put)
        waiting.start()
        asked.wait()
        shared.give_up()
        waiting.join()
        let_go.set()
    assert "given up" in said[0]
    shared.give_up()
    with pytest.raises(SharedStoreError, match="given up"):
        shared.files(DIGESTS[0])


def test_who_waits_to_ask_is_let_go_too_when_the_store_is_given_up() -> None:
    shared = SharedObjects(f"failing://{uuid4().hex}", patience=3600)
    asked, let_go, said = threading.Semaphore(0), threading.Event(), []

    def hang(call: str, path: str) -> None:
        asked.release()
        let_go.wait()

    def put() -> None:
        with pytest.raises(SharedStoreError) as caught:
            shared.put(*files(0))
        said.append(str(caught.value))

    class Waiting(threading.Semaphore):
        """Tells of those that will have to wait."""

        def acquire(self, *args: Any, **kwargs: Any) -> bool:
            if self._value == 0:
                asked.release()
            return super().acquire(*args, **kwargs)

    shared._questions = Waiting(4)
    with failing(hang):
        waiting = [threading.Thread(target=put) for _ in range(7)]
        for some in (waiting[:4], waiting[4:]):  # Those that ask, and those that wait to.
            for thread in some:
                thread.start()
            for _ in some:
                assert asked.acquire(timeout=60)
        shared.give_up()
        for thread in waiting:
            thread.join(60)
        let_go.set()
    assert len(said) == 7
    assert all("given up" in each for each in said)


def test_both_waits_have_one_deadline(monkeypatch: pytest.MonkeyPatch) -> None:
    """That for a free question, and that for its answer."""
    shared, now = SharedObjects(f"failing://{uuid4().hex}", patience=10), [0.0]
    waits: list[float] = []

    class Slow(threading.Semaphore):
        def acquire(self, blocking: bool = True, timeout: float | None = None) -> bool:
            assert timeout is not None
            waits.append(timeout)
            now[0] += 7
            return super().acquire()

    def wait_for(futures: Any, timeout: float, when: str) -> Any:
        waits.append(timeout)
        return wait(futures, 60, when)

    shared._questions = Slow(4)
    monkeypatch.setattr(shared_objects, "wait", wait_for)
    monkeypatch.setattr(shared_objects, "time", SimpleNamespace(monotonic=lambda: now[0]))
    assert DIGESTS[0] not in shared
    assert waits == [10, 3]


def test_a_thread_that_cannot_be_started_holds_no_question(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    shared = SharedObjects(f"failing://{uuid4().hex}", patience=60)

    def refuse(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", refuse)
        for _ in range(9):
            with pytest.raises(SharedStoreError, match=r"it fails \(RuntimeError\)"):
                DIGESTS[0] in shared  # noqa: B015  # asks
    assert DIGESTS[0] not in shared


def test_what_is_whole_is_not_written_again(url: str) -> None:
    """A write may cut a file short first, so a put that fails would leave a half."""
    shared = SharedObjects(url)
    shared.put(*files(0))

    def cut(call: str, path: str) -> None:
        assert call != "pipe_file"

    def refuse(event: str, subject: Any) -> None:
        raise AssertionError(f"{event} of {subject}")

    with failing(cut), watching(refuse):
        assert shared.put(*files(0)) == DIGESTS[0]


def test_many_put_and_read_one_object_at_a_time(url: str) -> None:
    """None of them ever sees a half."""

    def act() -> None:
        shared = SharedObjects(url)
        for _ in range(10):
            assert shared.put(*files(0)) == DIGESTS[0]
            assert shared.files(DIGESTS[0]) == files(0)

    with ThreadPoolExecutor(4) as pool:
        for done in [pool.submit(act) for _ in range(4)]:
            done.result()


def test_libraries_do_not_log_what_they_send(
    caplog: pytest.LogCaptureFixture, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("botocore", "fsspec"):
        monkeypatch.setattr(logging.getLogger(name), "level", logging.NOTSET)
        logging.getLogger(name).manager._clear_cache()  # type: ignore[attr-defined]
    with caplog.at_level(logging.DEBUG):
        shared = SharedObjects(url)
        logging.getLogger("botocore.auth").debug("authorization: secret")
        logging.getLogger("botocore.auth").info("no secret is told here")
        shared.put(*files(0))
    assert [record.message for record in caplog.records] == ["no secret is told here"]

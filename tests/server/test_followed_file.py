"""Where followed files lie: paths and URLs, and what is told of those that cannot be read."""

from __future__ import annotations

import io
import json
import os
import sys
import threading
from concurrent.futures import CancelledError
from pathlib import Path
from typing import Any, ClassVar

import fsspec
import pytest

from superpose_server.control import followed_file
from superpose_server.control.followed_file import FollowedFile
from superpose_server.control.mix_file import MOST_BYTES, MixFile, MixFileError

ONE, TWO = MixFile({"math": 1.0}), MixFile({})


def text_of(file: MixFile) -> bytes:
    return json.dumps({"mix": dict(file.mix)}).encode()


@pytest.mark.parametrize("write", ["{}", "file://{}"])
def test_a_path_and_a_url_are_read_anew_each_time(tmp_path: Path, write: str) -> None:
    path = tmp_path / "mixes.json"
    followed = FollowedFile(write.format(path))
    assert (followed.name, followed.short_name) == (write.format(path), "mixes.json")
    for file in (ONE, TWO, ONE):
        path.write_bytes(text_of(file))
        os.utime(path, ns=(0, 0))  # No stamp tells that it changed.
        assert followed.read() == file


def test_any_url_of_fsspec_s_will_do() -> None:
    memory = fsspec.filesystem("memory")
    followed = FollowedFile("memory://follow/mixes.json")
    memory.pipe_file("/follow/mixes.json", text_of(ONE))
    assert followed.read() == ONE
    memory.pipe_file("/follow/mixes.json", text_of(TWO))
    assert followed.read() == TWO
    memory.rm("/follow", recursive=True)
    with pytest.raises(MixFileError, match=r"^it cannot be read \(FileNotFoundError\)$"):
        followed.read()


@pytest.mark.parametrize(
    ("location", "name", "short"),
    [
        ("/etc/superpose/mixes.json", "/etc/superpose/mixes.json", "mixes.json"),
        ("mixes.json", "mixes.json", "mixes.json"),
        ("what?.json", "what?.json", "what?.json"),
        ("https://me:secret@h:1/a/m.json?sig=secret#secret", "https://h:1/a/m.json", "m.json"),
        ("s3://bucket/mixes.json?versionId=secret", "s3://bucket/mixes.json", "mixes.json"),
        ("simplecache::https://secret@h/m.json?secret", "simplecache::https://h/m.json", "m.json"),
        ("sftp://me:p@ss@h/m.json", "sftp://h/m.json", "m.json"),
        ("https://me:p/w@h/m.json", "https://h/m.json", "m.json"),
        ("https://me:p?w@h/m.json", "https://...", "..."),
        ("ftp://h/a\nb", "ftp://h/a\\nb", "a\\nb"),
    ],
)
def test_what_a_url_has_of_secrets_is_not_told(location: str, name: str, short: str) -> None:
    followed = FollowedFile(location)
    assert (followed.name, followed.short_name) == (name, short)


@pytest.mark.parametrize("write", ["{}", "file://{}"])
def test_what_cannot_be_read_is_told_in_one_line(tmp_path: Path, write: str) -> None:
    followed = FollowedFile(write.format(tmp_path / "none.json"))
    with pytest.raises(MixFileError, match=r"^it cannot be read \(No such file or directory\)$"):
        followed.read()
    with pytest.raises(MixFileError, match=r"^it cannot be read \(Is a directory\)$"):
        FollowedFile(str(tmp_path)).read()


def test_a_file_without_end_is_not_read_to_it(tmp_path: Path) -> None:
    path = tmp_path / "mixes.json"
    with path.open("wb") as file:
        file.truncate(MOST_BYTES << 12)  # sparse: takes no space
    with pytest.raises(MixFileError, match=r"^it is larger than 4 MiB$"):
        FollowedFile(str(path)).read()


def test_a_package_that_a_url_needs_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "aiohttp", None)
    monkeypatch.delitem(sys.modules, "fsspec.implementations.http", raising=False)
    known = sys.modules["fsspec.registry"]._registry
    monkeypatch.delitem(known, "https", raising=False)
    with pytest.raises(MixFileError, match=r"^a URL of https needs .*: pip install aiohttp$"):
        FollowedFile("https://127.0.0.1:1/mixes.json").read()


def test_a_scheme_that_nobody_knows_is_refused() -> None:
    for more in ("", "?sig=secret"):
        with pytest.raises(MixFileError, match=r"^its scheme nonesuch is unknown: use a path, \S+"):
            FollowedFile(f"nonesuch://x/mixes.json{more}").read()


def test_what_others_keep_is_not_followed(tmp_path: Path) -> None:
    path = tmp_path / "mixes.json"
    path.write_bytes(text_of(ONE))
    with pytest.raises(MixFileError, match=r"^a URL with :: is not followed"):
        FollowedFile(f"simplecache::file://{path}").read()
    (tmp_path / "a::b").write_bytes(text_of(ONE))  # Which a path may have.
    assert FollowedFile(str(tmp_path / "a::b")).read() == ONE


class Keeping(fsspec.AbstractFileSystem):  # type: ignore[misc]
    """A file system that keeps what it has seen, as those with listings do; one byte at a time."""

    protocol = "keeping"
    there: ClassVar[bytes] = b""
    made: ClassVar[int] = 0

    def __init__(self) -> None:
        super().__init__()
        Keeping.made += 1
        self._seen: bytes | None = None

    def invalidate_cache(self, path: str | None = None) -> None:
        self._seen = None

    def open(self, path: str, mode: str = "rb", **_: object) -> Any:
        if path == "gone":
            raise FileNotFoundError(path)
        self._seen = Keeping.there if self._seen is None else self._seen
        return Trickling(self._seen)


class Trickling(io.BytesIO):
    """A file that gives less than what it is asked for, as networks do."""

    def read(self, size: int | None = -1) -> bytes:
        assert size is not None
        assert size > 0
        return super().read(1)


def test_a_url_is_read_anew_and_whole_whatever_others_keep_of_it() -> None:
    fsspec.register_implementation("keeping", Keeping, clobber=True)
    Keeping.clear_instance_cache()
    Keeping.made = 0
    others = fsspec.filesystem("keeping")
    Keeping.there = text_of(ONE)
    assert others.open("mixes.json")
    followed = FollowedFile("keeping://mixes.json")
    for file in (TWO, ONE, TWO):
        Keeping.there = text_of(file)
        assert followed.read() == file
    assert Keeping.made == 2  # That of the others, and one.


def test_a_url_without_end_is_not_read_to_it(monkeypatch: pytest.MonkeyPatch) -> None:
    fsspec.register_implementation("keeping", Keeping, clobber=True)
    monkeypatch.setattr(followed_file, "MOST_BYTES", 1 << 10)
    Keeping.there = b" " * (1 << 20)
    assert len(FollowedFile("keeping://mixes.json")._bytes()) == (1 << 10) + 1


def test_what_has_failed_is_made_anew() -> None:
    """A connection may be broken for good, and a file system's is kept with it."""
    fsspec.register_implementation("keeping", Keeping, clobber=True)
    Keeping.made = 0
    followed = FollowedFile("keeping://gone")
    for made in (1, 2):
        with pytest.raises(MixFileError, match=r"^it cannot be read \(FileNotFoundError\)$"):
            followed.read()
        assert Keeping.made == made


class Telling(fsspec.AbstractFileSystem):  # type: ignore[misc]
    """A file system whose errors hold what it was asked for, in each place of an error's."""

    protocol = "telling"
    cachable = False

    def _open(self, path: str, *_: object, **__: object) -> object:
        kind = {"a": FileNotFoundError, "b": PermissionError, "c": ValueError}[path[-1]]
        raise kind(*[f"telling://{path} is secret"] * (1 + path.count("2")))


@pytest.mark.parametrize("path", ["1a", "2a", "22a", "1b", "2b", "1c", "2c"])
def test_no_error_tells_the_secrets_of_a_url(path: str) -> None:
    fsspec.register_implementation("telling", Telling, clobber=True)
    followed = FollowedFile(f"telling://me:secret@h/{path}")
    with pytest.raises(MixFileError, match=r"^it cannot be read \(\w+\)$") as caught:
        followed.read()
    assert "secret" not in str(caught.value)


@pytest.fixture
def pipe(tmp_path: Path) -> Path:
    """A file that answers nothing until somebody writes."""
    path = tmp_path / "pipe"
    os.mkfifo(path)
    return path


def test_what_does_not_answer_is_asked_once_and_waited_for_again(
    pipe: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(followed_file, "PATIENCE", 0.05)
    followed = FollowedFile(str(pipe))
    for _ in range(3):
        with pytest.raises(MixFileError, match=r"^it has not answered within 0\.05 s$"):
            followed.read()
    assert [thread.name for thread in threading.enumerate()].count("follow-read") == 1
    monkeypatch.setattr(followed_file, "PATIENCE", 60)
    with pipe.open("wb") as writer:
        writer.write(text_of(ONE))
    assert followed.read() == ONE


def test_a_reading_ends_where_it_is_given_up(pipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(followed_file, "PATIENCE", 3600)
    followed = FollowedFile(str(pipe))
    ended = threading.Event()

    def read() -> None:
        with pytest.raises(CancelledError):
            followed.read()
        ended.set()

    reader = threading.Thread(target=read)
    reader.start()
    with pipe.open("wb"):  # Which waits until somebody has opened it to read.
        followed.close()
        assert ended.wait(60)
        with pytest.raises(CancelledError):  # And so does what comes after that.
            followed.read()
    reader.join()

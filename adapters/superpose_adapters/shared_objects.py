"""Adapters by digest in a store that servers share: a folder, or whatever fsspec has a scheme for.

    URL/objects/<digest>/adapter_config.json
    URL/objects/<digest>/adapter_model.safetensors

Invariant: nobody takes a half for a whole. Into a folder an object comes by one rename. Elsewhere
there are none: the tensor file is written first, and an object is there once its config is. What is
read is checked against its digest in any case. Objects are never removed.

Nothing that another library says is repeated: it may hold the URL's password, or a signature.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable
from concurrent.futures import FIRST_COMPLETED, Future, wait
from pathlib import Path
from threading import Semaphore, Thread
from typing import Any, TypeVar

from superpose_adapters.objects import Objects, damage, is_digest
from superpose_adapters.peft.folder import CONFIG_NAME, TENSORS_NAME, files_digest
from superpose_adapters.store_error import StoreError
from superpose_adapters.without_secrets import without_secrets

T = TypeVar("T")

# Seconds that the store gets for an answer, and bytes a second that it has to move beside it.
PATIENCE = 30.0
_SLOWEST = 1 << 20
# Questions at a time: those that hang keep a thread and their bytes for as long as they do.
_MOST_QUESTIONS = 4
# No file of an adapter can be larger: one came as a message of at most this.
_LARGEST = 2 << 30
_GIVEN_UP = ("given up", "this server ends, so ask another one")
# Schemes whose first part of a path is a bucket; without it every object is merely not found.
_BUCKETS = {"s3", "s3a", "gs", "gcs"}
# They write heads of requests, with tokens, into a log of DEBUG.
_TALKATIVE = ("fsspec", "s3fs", "aiobotocore", "botocore", "gcsfs", "google", "urllib3", "httpx")


class SharedStoreError(StoreError):
    """The shared store refuses, does not answer, or holds what is damaged.

    Attributes:
        why: The same without the place and the remedy, for those who must not know where it is.
    """

    def __init__(self, place: str, why: str, remedy: str) -> None:
        """Say so in one line, which names a place that holds no secret."""
        super().__init__(f"{place}: {why}: {remedy}")
        self.why = why


class SharedObjectDamaged(SharedStoreError):
    """An object of the shared store is there, and is not what its digest says."""


class SharedObjects:
    """The adapters in a shared store, by digest. Any number of threads, processes and machines.

    Attributes:
        url: Where it is, without user, password and query.
        folder: The folder that it is; None: it is elsewhere.
    """

    def __init__(self, url: str, *, patience: float = PATIENCE) -> None:
        """Use the store at `url`; nothing is read or written yet.

        Args:
            url: A folder, or SCHEME://PLACE.
            patience: Seconds within which the store has to answer; moving bytes may take a second
                more for each MiB.

        Raises:
            SharedStoreError: The URL means nothing, or needs a package that is not installed.
        """
        self.url = without_secrets(url)
        self._patience = patience
        self._questions = Semaphore(_MOST_QUESTIONS)
        self._given_up: Future[None] = Future()
        for name in _TALKATIVE:
            library = logging.getLogger(name)
            if library.getEffectiveLevel() < logging.INFO:
                library.setLevel(logging.INFO)
        if not url or ("://" in url and ("?" in url or "::" in url)):
            raise SharedStoreError(
                self.url or "an empty URL",
                "no store",
                "name a folder, or a URL such as s3://BUCKET/PATH, without a query and without ::",
            )
        self._fs, root = self._ask(lambda: _file_system(url, self.url))
        self._root = root.rstrip("/")
        self._in_bucket = url.partition("://")[0] in _BUCKETS
        self.folder = Path(root) if _is_folder(self._fs) else None

    def give_up(self) -> None:
        """Let every call that waits, and every later one, fail at once."""
        if not self._given_up.done():
            self._given_up.set_result(None)
            self._questions.release()  # For who waits to ask; each lets the next one go.

    def __contains__(self, digest: object) -> bool:
        """Tell whether an object of this digest is stored.

        Raises:
            SharedStoreError: The store cannot be asked.
        """
        return is_digest(digest) and self._size(self._path(digest, CONFIG_NAME)) is not None

    def put(self, config: bytes, tensors: bytes) -> str:
        """Store an adapter's two files, which the loader has accepted, and return their digest.

        Durable when it returns. What is stored already is left as it is, unless it is damaged: then
        it is replaced.

        Raises:
            SharedStoreError: The store refuses; the object is not there, or is as it was.
            AdapterError: The files are not an adapter's.
        """
        digest = files_digest(config, tensors)
        # Not over what is whole: there are stores where a write cuts a file short first.
        if not self._is_whole(digest):
            self._ask(lambda: self._write(digest, config, tensors), len(config) + len(tensors))
        return digest

    def _is_whole(self, digest: str) -> bool:
        try:
            self.files(digest)
        except (KeyError, SharedObjectDamaged):
            return False
        return True

    def _write(self, digest: str, config: bytes, tensors: bytes) -> None:
        if self.folder is None:
            self._fs.pipe_file(self._path(digest, TENSORS_NAME), tensors)
            self._fs.pipe_file(self._path(digest, CONFIG_NAME), config)
            return
        # Never made here: where nothing is mounted, it would be the wrong disk.
        self.folder.stat()
        try:
            Objects(self.folder).put(config, tensors)
        except StoreError as error:  # Of what the disk said, which is said in words of ours.
            raise error.__cause__ or error from None

    def files(self, digest: str) -> tuple[bytes, bytes]:
        """Return the config and tensor files of an object, checked against its digest.

        Raises:
            KeyError: No object of this digest is stored.
            SharedObjectDamaged: The object is not what was put.
            SharedStoreError: The store cannot be read.
        """
        config = self._read(digest, CONFIG_NAME) if is_digest(digest) else None
        if config is None:
            raise KeyError(digest)
        tensors = self._read(digest, TENSORS_NAME)
        if tensors is None:
            raise self._damaged(digest, f"{TENSORS_NAME} is missing")
        why = damage(digest, config, tensors)
        if why is not None:
            raise self._damaged(digest, why)
        return config, tensors

    def _read(self, digest: str, name: str) -> bytes | None:
        """Return the bytes of a file; None: there is none."""
        path = self._path(digest, name)
        size = self._size(path)
        if size is None:
            return None
        if not 0 < size <= _LARGEST:
            raise self._damaged(digest, f"{name} has {size} bytes")
        data: bytes = self._ask(lambda: self._fs.cat_file(path, start=0, end=size), size)
        return data

    def _size(self, path: str) -> int | None:
        """Return the size of a file in bytes; None: there is none."""

        def ask() -> int | None:
            self._fs.invalidate_cache()  # Others write there, too.
            try:
                size: int = self._fs.info(path)["size"]
            except FileNotFoundError:
                self._check_place()
                return None
            return size

        return self._ask(ask)

    def _check_place(self) -> None:
        """Look for the folder or bucket: what is in one that is not there, nobody knows.

        Raises:
            FileNotFoundError: It is not there.
        """
        if self.folder is not None:
            self.folder.stat()
        elif self._in_bucket:
            try:
                self._fs.info(self._root.partition("/")[0])
            except FileNotFoundError:
                raise
            except Exception:  # Who may use what is in it may not ask for the bucket itself.
                return

    def _path(self, digest: str, name: str) -> str:
        return f"{self._root}/objects/{digest}/{name}"

    def _ask(self, question: Callable[[], T], size: int = 0) -> T:
        """Return what `question` returns, which moves `size` bytes.

        Raises:
            SharedStoreError: Whatever it raises, or it takes too long.
        """
        patience = self._patience + size / _SLOWEST
        try:
            return self._within(patience, question)
        except SharedStoreError:
            raise
        except Exception as error:
            why, remedy = _said(error, patience)
        raise SharedStoreError(self.url, why, remedy)

    def _within(self, patience: float, question: Callable[[], T]) -> T:
        """Return what `question` returns, on a thread that nobody waits for any longer than that.

        Raises:
            TimeoutError: It takes longer.
            SharedStoreError: The store was given up.
        """
        deadline = time.monotonic() + patience
        answer: Future[T] = Future()

        def run() -> None:
            try:
                answer.set_result(question())
            except BaseException as error:
                answer.set_exception(error)
            finally:
                self._questions.release()

        if not self._given_up.done() and not self._questions.acquire(timeout=patience):
            raise TimeoutError
        if self._given_up.done():
            self._questions.release()  # For the next that waits.
            raise SharedStoreError(self.url, *_GIVEN_UP)
        try:
            Thread(target=run, name="shared-store", daemon=True).start()
        except BaseException:
            self._questions.release()
            raise
        either: tuple[Future[Any], ...] = (answer, self._given_up)
        wait(either, max(0.0, deadline - time.monotonic()), FIRST_COMPLETED)
        if answer.done():
            return answer.result()
        if self._given_up.done():
            raise SharedStoreError(self.url, *_GIVEN_UP)
        raise TimeoutError

    def _damaged(self, digest: str, why: str) -> SharedObjectDamaged:
        return SharedObjectDamaged(
            f"{self.url}/objects/{digest}",
            f"damaged ({why})",
            "restore it, or remove it there and push the adapter again",
        )


def _file_system(url: str, told: str) -> tuple[Any, str]:
    """Return fsspec's file system of a URL, and the path in it.

    Raises:
        SharedStoreError: There is none.
    """
    import fsspec
    from fsspec.registry import known_implementations, registry

    if "://" not in url:
        return fsspec.filesystem("file"), str(Path(url).expanduser().absolute())
    scheme = url.partition("://")[0]
    if scheme not in known_implementations and scheme not in registry:
        raise SharedStoreError(
            told, f"its scheme {scheme} is unknown", "use a folder, s3://, gs:// or hf://"
        )
    try:
        fsspec.get_filesystem_class(scheme)
    except ImportError:
        package = known_implementations[scheme]["class"].partition(".")[0]
        needed = f"pip install {package}" if package != "fsspec" else "see fsspec's documentation"
        raise SharedStoreError(
            told, f"its scheme {scheme} needs a package that is not installed", needed
        ) from None
    # An instance of its own: what others in this process have seen of the store may be old.
    file_system, root = fsspec.core.url_to_fs(url, skip_instance_cache=True)
    return file_system, root


def _is_folder(file_system: Any) -> bool:
    from fsspec.implementations.local import LocalFileSystem

    return isinstance(file_system, LocalFileSystem)


def _said(error: Exception, patience: float) -> tuple[str, str]:
    """Return in our words what went wrong, and the remedy."""
    number = error.errno if isinstance(error, OSError) else None
    kind = os.strerror(number) if isinstance(number, int) else type(error).__name__
    if isinstance(error, TimeoutError):
        return f"no answer within {patience:.3g} s", "check that it is up and can be reached"
    if isinstance(error, PermissionError) or "Credentials" in type(error).__name__:
        return f"access is denied ({kind})", "check the credentials and rights of this user"
    if isinstance(error, FileNotFoundError | NotADirectoryError):
        return f"it is not there ({kind})", "create that folder or bucket, or mend the URL"
    return f"it fails ({kind})", "check the URL, its space, and that it can be reached"

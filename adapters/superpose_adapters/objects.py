"""Adapters on disk under their digest: written once, and checked whenever they are read.

    <folder>/objects/<digest>/...   the two files of an adapter, never changed
    <folder>/temporary/...          what is being written or removed

Invariant: whatever instant the machine stops at, an object is there whole or not at all. Several
processes may put and read at a time, since each object appears by one rename; only one may
`collect` and `clean`, while no other puts.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Collection
from pathlib import Path
from typing import TypeGuard
from uuid import uuid4

from superpose_adapters.adapter import AdapterError
from superpose_adapters.durable import sync, write_synced
from superpose_adapters.peft.folder import CONFIG_NAME, TENSORS_NAME, files_digest
from superpose_adapters.store_error import Damaged, cannot_write

_DIGEST = re.compile(r"[0-9a-f]{64}")


def is_digest(value: object) -> TypeGuard[str]:
    """Tell whether a value is written as a digest is, so that it may be a part of a path."""
    return isinstance(value, str) and bool(_DIGEST.fullmatch(value))


def damage(digest: str, config: bytes, tensors: bytes) -> str | None:
    """Return why two files are not the adapter of this digest; None: they are."""
    try:
        found = files_digest(config, tensors)
    except AdapterError as error:
        return str(error)
    return None if found == digest else f"its contents have the digest {found}"


class Objects:
    """The adapters in one folder, by digest."""

    def __init__(self, folder: Path) -> None:
        """Use `folder`; what is needed in it is made by the first `put`."""
        self._folder = folder
        self._objects = folder / "objects"
        self._temporary = folder / "temporary"

    def __contains__(self, digest: object) -> bool:
        """Tell whether an object of this digest is stored."""
        return is_digest(digest) and (self._objects / digest).is_dir()

    def put(self, config: bytes, tensors: bytes) -> str:
        """Store an adapter's two files, which the loader has accepted, and return their digest.

        Durable when it returns. What is stored already is left as it is, unless it is damaged: then
        it is replaced.

        Raises:
            StoreError: The disk refuses; the objects are as they were.
            AdapterError: The files are not an adapter's.
        """
        digest = files_digest(config, tensors)
        if self._is_whole(digest):
            return digest
        # A name of its own, as another process may put the same.
        fresh = self._temporary / f"{digest}-{uuid4().hex}"
        try:
            fresh.mkdir(parents=True)
            write_synced(fresh / CONFIG_NAME, config)
            write_synced(fresh / TENSORS_NAME, tensors)
            sync(fresh)
            self._place(fresh, self._objects / digest)
        except OSError as error:
            raise cannot_write(self._folder, error) from error
        finally:
            shutil.rmtree(fresh, ignore_errors=True)
        return digest

    def _place(self, fresh: Path, final: Path) -> None:
        """Let what is whole in `fresh` be what is in `final`."""
        if not self._objects.is_dir():
            self._objects.mkdir(parents=True, exist_ok=True)
            sync(self._folder)
        if not final.exists():
            try:
                fresh.rename(final)
            except OSError:
                if not final.is_dir():  # Else another process was quicker.
                    raise
            else:
                sync(self._objects)
                return
        # File by file, so that it is never missing. Whose files they are makes no difference: all
        # pairs of files of one digest have one effect.
        for name in (CONFIG_NAME, TENSORS_NAME):
            (fresh / name).replace(final / name)
        sync(final)

    def files(self, digest: str) -> tuple[bytes, bytes]:
        """Return the config and tensor files of an object, checked against its digest.

        Raises:
            KeyError: No object of this digest is stored.
            Damaged: Its files are not those of this digest.
        """
        if digest not in self:
            raise KeyError(digest)
        path = self._objects / digest
        try:
            config = (path / CONFIG_NAME).read_bytes()
            tensors = (path / TENSORS_NAME).read_bytes()
        except OSError as error:
            raise Damaged(path, str(error)) from error
        why = damage(digest, config, tensors)
        if why is not None:
            raise Damaged(path, why)
        return config, tensors

    def _is_whole(self, digest: str) -> bool:
        try:
            self.files(digest)
        except (KeyError, Damaged):
            return False
        return True

    def collect(self, keep: Collection[str]) -> list[str]:
        """Remove every object whose digest is not among `keep`.

        Returns:
            The digests that were removed.

        Raises:
            OSError: The disk refuses; what is left is whole.
        """
        if not self._objects.is_dir():
            return []
        removed = sorted(path.name for path in self._objects.iterdir() if path.name not in keep)
        for digest in removed:
            # Out of sight by one rename first, so that no half of an object is found later.
            self._temporary.mkdir(exist_ok=True)
            doomed = self._temporary / f"removed-{digest}-{uuid4().hex}"
            (self._objects / digest).rename(doomed)
            shutil.rmtree(doomed, ignore_errors=True)
        return removed

    def clean(self) -> None:
        """Remove what processes have left that were killed while they wrote or removed."""
        shutil.rmtree(self._temporary, ignore_errors=True)

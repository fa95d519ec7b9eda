"""Pushed adapters on disk: contents under their digest, and names that point at digests.

    <state>/adapters/lock                       held while the store is open
    <state>/adapters/objects/<digest>/...       the two files of an adapter, never changed
    <state>/adapters/names.json                 {domain: digest, or what was said with it}
    <state>/adapters/names.json.previous        what it held before
    <state>/adapters/temporary/...              what is being written

Invariant: whatever instant the machine stops at, `names.json` is whole and every digest in it has a
whole object. So an object is made durable first and named afterwards, and every change appears by
one rename. What a crash left unfinished is removed when the store is next opened, and an object
that it left without a name when `collect` is next called.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from filelock import lock_descriptor

from superpose_adapters.adapter import Adapter, AdapterError
from superpose_adapters.base.facts import BaseFacts
from superpose_adapters.digest import canonical_json
from superpose_adapters.durable import RevertibleFile, sync, write_synced
from superpose_adapters.layout import Layout
from superpose_adapters.mix_syntax import RESERVED_NAMES, check_name
from superpose_adapters.peft.folder import (
    CONFIG_NAME,
    DEFAULT_LIMITS,
    TENSORS_NAME,
    Limits,
    files_digest,
    parse_adapter,
)
from superpose_adapters.provenance import Provenance, provenance_from_json

_DIGEST = re.compile(r"[0-9a-f]{64}")


class StoreError(Exception):
    """The store cannot be used as it is: locked, damaged, or the disk refuses.

    The message is one line that names the path and the remedy.
    """


@dataclass(frozen=True)
class Named:
    """What a name points at, and what was said when it got there.

    That is kept with the name: adapters of one effect share an object, whatever else their files
    say.

    Attributes:
        digest: The adapter's.
        warnings: See `Adapter`.
        provenance: See `Adapter`.
    """

    digest: str
    warnings: tuple[str, ...] = ()
    provenance: Provenance | None = None


class AdapterStore:
    """A content-addressed store of adapters. One process, and in it one thread, at a time."""

    def __init__(self, folder: Path) -> None:
        """Open or create the store in `folder`.

        Raises:
            StoreError: Another process holds it, its names are damaged, or the disk refuses.
        """
        self._folder = folder
        self._objects = folder / "objects"
        self._temporary = folder / "temporary"
        self._index = folder / "names.json"
        try:
            self._objects.mkdir(parents=True, exist_ok=True)
            self._lock = os.open(folder / "lock", os.O_RDWR | os.O_CREAT, 0o600)
        except OSError as error:
            raise self._refused(error) from error
        try:
            # Of the descriptor: it ends with the process, however that ends, and the file stays.
            if not lock_descriptor(self._lock, blocking=False):
                raise StoreError(
                    f"{folder}: another server uses it: stop that one or choose another --state-dir"
                )
            shutil.rmtree(self._temporary, ignore_errors=True)
            self._temporary.mkdir(exist_ok=True)
            self._file = RevertibleFile(self._index)
            self._names = self._read_names()
        except OSError as error:
            self.close()
            raise self._refused(error) from error
        except StoreError:
            self.close()
            raise

    def close(self) -> None:
        """Let another process open the store. Closing twice is allowed."""
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1

    def __enter__(self) -> AdapterStore:
        """Return the open store."""
        return self

    def __exit__(self, *_: object) -> None:
        """Close the store."""
        self.close()

    @property
    def names(self) -> Mapping[str, str]:
        """The names, {domain: digest}, as a read-only copy."""
        return MappingProxyType({domain: named.digest for domain, named in self._names.items()})

    def named(self, domain: str) -> Named:
        """Return what a name points at, and what was said with it.

        Raises:
            KeyError: There is no such name.
        """
        return self._names[domain]

    def __contains__(self, digest: object) -> bool:
        """Tell whether an object of this digest is stored."""
        return (
            isinstance(digest, str)
            and bool(_DIGEST.fullmatch(digest))
            and (self._objects / digest).is_dir()
        )

    def put(self, config: bytes, tensors: bytes) -> str:
        """Store an adapter's two files, which the loader has accepted, and return their digest.

        Durable when it returns. What is stored already is left as it is, unless it is damaged: then
        it is replaced.

        Raises:
            StoreError: The disk refuses; the store is as it was.
            AdapterError: The files are not an adapter's.
        """
        digest = files_digest(config, tensors)
        if digest in self and self._is_whole(digest):
            return digest
        fresh, final = self._temporary / digest, self._objects / digest
        try:
            shutil.rmtree(fresh, ignore_errors=True)
            fresh.mkdir()
            write_synced(fresh / CONFIG_NAME, config)
            write_synced(fresh / TENSORS_NAME, tensors)
            sync(fresh)
            if final.exists():  # damaged: mended file by file, so that it is never missing
                for name in (CONFIG_NAME, TENSORS_NAME):
                    (fresh / name).replace(final / name)
                sync(final)
            else:
                fresh.rename(final)
                sync(self._objects)
        except OSError as error:
            raise self._refused(error) from error
        finally:
            shutil.rmtree(fresh, ignore_errors=True)
        return digest

    def set_name(
        self,
        domain: str,
        digest: str,
        warnings: Sequence[str] = (),
        provenance: Provenance | None = None,
    ) -> None:
        """Let `domain` name a stored adapter, in place of what it named before.

        For `warnings` and `provenance` see `Named`.

        Raises:
            ValueError: `domain` is no valid name.
            KeyError: No object of this digest is stored.
            StoreError: The disk refuses; the names are as they were.
        """
        check_name(domain)
        if digest not in self:
            raise KeyError(digest)
        self._write_names({**self._names, domain: Named(digest, tuple(warnings), provenance)})

    def delete_name(self, domain: str) -> None:
        """Remove a name. The object stays until `collect`: a running row may use it still.

        Raises:
            KeyError: There is no such name.
            StoreError: The disk refuses; the names are as they were.
        """
        if domain not in self._names:
            raise KeyError(domain)
        self._write_names({d: named for d, named in self._names.items() if d != domain})

    def files(self, digest: str) -> tuple[bytes, bytes]:
        """Return the config and tensor files of an object, checked against its digest.

        Raises:
            KeyError: No object of this digest is stored.
            StoreError: The object is damaged.
        """
        if digest not in self:
            raise KeyError(digest)
        path = self._objects / digest
        try:
            config = (path / CONFIG_NAME).read_bytes()
            tensors = (path / TENSORS_NAME).read_bytes()
            found = files_digest(config, tensors)
        except (OSError, AdapterError) as error:
            raise self._damaged(path, str(error)) from error
        if found != digest:
            raise self._damaged(path, f"its contents have the digest {found}")
        return config, tensors

    def load(
        self,
        digest: str,
        layout: Layout,
        limits: Limits = DEFAULT_LIMITS,
        *,
        base: BaseFacts | None = None,
    ) -> Adapter:
        """Return a stored adapter, checked again, as it may be served on another base now.

        For the arguments see `read_adapter`.

        Raises:
            KeyError: No object of this digest is stored.
            StoreError: The object is damaged.
            AdapterError: It does not fit this base or these limits.
        """
        return parse_adapter(*self.files(digest), layout, limits, base=base)

    def collect(self, in_use: Collection[str]) -> list[str]:
        """Remove every object that has no name and is not among the digests `in_use`.

        Returns:
            The digests that were removed.

        Raises:
            OSError: The disk refuses; what is left is whole.
        """
        keep = {*in_use, *self.names.values()}
        removed = sorted(path.name for path in self._objects.iterdir() if path.name not in keep)
        for digest in removed:
            # Out of sight by one rename first, so that no half of an object is found later.
            doomed = self._temporary / f"removed-{digest}"
            (self._objects / digest).rename(doomed)
            shutil.rmtree(doomed, ignore_errors=True)
        return removed

    def _is_whole(self, digest: str) -> bool:
        try:
            self.files(digest)
        except StoreError:
            return False
        return True

    def _read_names(self) -> dict[str, Named]:
        written = self._file.read()
        if written is None:
            return {}
        try:
            names: Any = json.loads(written)
        except (ValueError, RecursionError) as error:
            raise self._damaged(self._index, "it is not JSON") from error
        if not isinstance(names, dict):
            raise self._damaged(self._index, "it is not an object")
        read: dict[str, Named] = {}
        for domain, value in names.items():
            try:
                check_name(domain)
            except ValueError as error:
                if domain in RESERVED_NAMES:  # A server that had no such words may have taken it.
                    raise StoreError(
                        f"{self._index}: pushed adapter {domain}: {error} and write it in this file"
                    ) from error
                raise self._damaged(self._index, str(error)) from error
            try:
                read[domain] = _from_json(value)
            except ValueError as error:
                raise self._damaged(self._index, f"{domain}: {error}") from error
            if read[domain].digest not in self:
                raise self._damaged(self._index, f"{domain} names an adapter that is not stored")
        return read

    def _write_names(self, names: Mapping[str, Named]) -> None:
        content = {domain: _as_json(named) for domain, named in names.items()}
        try:
            self._file.write(canonical_json(content))
        except OSError as error:
            raise self._refused(error) from error
        self._names = dict(names)

    def _refused(self, error: OSError) -> StoreError:
        return StoreError(
            f"{self._folder}: cannot write ({error.strerror}): free space or check permissions"
        )

    @staticmethod
    def _damaged(path: Path, why: str) -> StoreError:
        return StoreError(f"{path}: damaged ({why}): restore it, or remove it and push again")


def _as_json(named: Named) -> object:
    """Return the shortest of the three forms, so that an older server reads what it can."""
    if named.provenance is not None:
        return {
            "digest": named.digest,
            "warnings": list(named.warnings),
            "provenance": named.provenance.as_json(),
        }
    return [named.digest, *named.warnings] if named.warnings else named.digest


def _from_json(value: Any) -> Named:
    """Return what `_as_json` has written.

    Raises:
        ValueError: It is something else; the message goes on after the name.
    """
    match value:
        case str():
            return Named(value)
        case [str(digest), *warnings]:
            provenance = None
        case {"digest": str(digest), "warnings": [*warnings], "provenance": written}:
            provenance = provenance_from_json(written)
        case _:
            raise ValueError("names no adapter")
    if not all(isinstance(said, str) for said in warnings):
        raise ValueError("has warnings that are no texts")
    return Named(digest, tuple(warnings), provenance)

"""Pushed adapters: contents under their digest, and names that point at digests.

    <state>/adapters/lock                       held while the store is open
    <state>/adapters/objects, temporary         the adapters by digest; see `objects`
    <state>/adapters/names.json                 {domain: digest, or what was said with it}
    <state>/adapters/names.json.previous        what it held before

Invariant: whatever instant the machine stops at, `names.json` is whole and every digest in it has a
whole object. So an object is made durable first and named afterwards, and every change appears by
one rename. What a crash left unfinished is removed when the store is next opened, and an object
that it left without a name when `collect` is next called.

With a shared store the objects here are copies, which are fetched again where they are missing or
damaged: whatever was put since there is one has a whole object there. What was put before is here
alone, until it is put again.
"""

from __future__ import annotations

import json
import os
from collections.abc import Collection, Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from filelock import lock_descriptor

from superpose_adapters.adapter import Adapter
from superpose_adapters.base.facts import BaseFacts
from superpose_adapters.cached_objects import CachedObjects
from superpose_adapters.digest import canonical_json
from superpose_adapters.durable import RevertibleFile
from superpose_adapters.layout import Layout
from superpose_adapters.mix_syntax import RESERVED_NAMES, check_name
from superpose_adapters.objects import Objects
from superpose_adapters.peft.folder import DEFAULT_LIMITS, Limits, parse_adapter
from superpose_adapters.provenance import Provenance, provenance_from_json
from superpose_adapters.shared_objects import SharedObjects
from superpose_adapters.store_error import Damaged, StoreError, cannot_write


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


_NAMES, _LOCK = "names.json", "lock"


def is_adapter_store(folder: Path) -> bool:
    """Tell whether a server keeps names of adapters in a folder, and removes what has none."""
    return (folder / _NAMES).exists() or (folder / _LOCK).exists()


class AdapterStore:
    """A content-addressed store of adapters. One process, and in it one thread, at a time."""

    def __init__(self, folder: Path, shared: SharedObjects | None = None) -> None:
        """Open or create the store in `folder`.

        Args:
            folder: Names and objects.
            shared: Where objects are put first, and read where they are not here. Names never are.

        Raises:
            StoreError: Another process holds it, its names are damaged, or the disk refuses.
            SharedStoreError: Whether something is there that a name points at, and that is not
                here, cannot be asked.
        """
        self._folder = folder
        self._shared = shared
        local = Objects(folder)
        self._objects = local if shared is None else CachedObjects(local, shared)
        self._index = folder / _NAMES
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._lock = os.open(folder / _LOCK, os.O_RDWR | os.O_CREAT, 0o600)
        except OSError as error:
            raise cannot_write(folder, error) from error
        try:
            # Of the descriptor: it ends with the process, however that ends, and the file stays.
            if not lock_descriptor(self._lock, blocking=False):
                raise StoreError(
                    f"{folder}: another server uses it: stop that one or choose another --state-dir"
                )
            local.clean()
            self._file = RevertibleFile(self._index)
            self._names = self._read_names()
        except OSError as error:
            self.close()
            raise cannot_write(folder, error) from error
        except StoreError:
            self.close()
            raise

    def close(self) -> None:
        """Let another process open the store. Closing twice is allowed."""
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1

    def give_up(self) -> None:
        """Let every call that waits for the shared store fail now; whatever thread that is on."""
        if self._shared is not None:
            self._shared.give_up()

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
        """Tell whether an object of this digest is stored, here or in the shared store.

        Raises:
            SharedStoreError: It is not here, and the shared store cannot be asked.
        """
        return digest in self._objects

    def put(self, config: bytes, tensors: bytes) -> str:
        """Store an adapter's two files; see `Objects.put`, or `CachedObjects.put`."""
        return self._objects.put(config, tensors)

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

    @contextmanager
    def naming(self, named: Mapping[str, Named]) -> Generator[None]:
        """Let domains name stored adapters, durably, while something is done that needs it.

        If that raises, all names are as they were; else they stay.

        Raises:
            StoreError: The disk refuses; the names are as they were, or could not be taken back.
        """
        before = self._names
        self._write_names({**before, **named})
        try:
            yield
        except BaseException:
            self._write_names(before)
            raise

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
        """Return the two files of an object; see `Objects.files`, or `CachedObjects.files`."""
        return self._objects.files(digest)

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

        From this folder: nothing is ever removed from a shared store, which others may need.

        Returns:
            The digests that were removed.

        Raises:
            OSError: The disk refuses; what is left is whole.
        """
        return self._objects.collect({*in_use, *self.names.values()})

    def _read_names(self) -> dict[str, Named]:
        written = self._file.read()
        if written is None:
            return {}
        try:
            names: Any = json.loads(written)
        except (ValueError, RecursionError) as error:
            raise Damaged(self._index, "it is not JSON") from error
        if not isinstance(names, dict):
            raise Damaged(self._index, "it is not an object")
        read: dict[str, Named] = {}
        for domain, value in names.items():
            try:
                check_name(domain)
            except ValueError as error:
                if domain in RESERVED_NAMES:  # A server that had no such words may have taken it.
                    raise StoreError(
                        f"{self._index}: pushed adapter {domain}: {error} and write it in this file"
                    ) from error
                raise Damaged(self._index, str(error)) from error
            try:
                read[domain] = _from_json(value)
            except ValueError as error:
                raise Damaged(self._index, f"{domain}: {error}") from error
            if read[domain].digest not in self:
                where = "" if self._shared is None else f", here or in {self._shared.url}"
                raise Damaged(self._index, f"{domain} names an adapter that is not stored{where}")
        return read

    def _write_names(self, names: Mapping[str, Named]) -> None:
        content = {domain: _as_json(named) for domain, named in names.items()}
        try:
            self._file.write(canonical_json(content))
        except OSError as error:
            raise cannot_write(self._folder, error) from error
        self._names = dict(names)


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

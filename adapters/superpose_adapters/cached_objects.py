"""Adapters of a shared store, with copies of those that this machine uses."""

from __future__ import annotations

import logging
from collections.abc import Collection

from superpose_adapters.objects import Objects
from superpose_adapters.shared_objects import SharedObjects
from superpose_adapters.store_error import Damaged, StoreError

_log = logging.getLogger(__name__)


class CachedObjects:
    """A shared store's adapters by digest, read from local copies where these are whole."""

    def __init__(self, local: Objects, shared: SharedObjects) -> None:
        """Keep copies in `local` of what `shared` holds."""
        self._local = local
        self._shared = shared

    def __contains__(self, digest: object) -> bool:
        """Tell whether there is an object of this digest, here or there.

        Raises:
            SharedStoreError: It is not here, and the shared store cannot be asked.
        """
        return digest in self._local or digest in self._shared

    def put(self, config: bytes, tensors: bytes) -> str:
        """Store an adapter's two files, which the loader has accepted, and return their digest.

        Durable in the shared store, and copied, when it returns.

        Raises:
            SharedStoreError: The shared store refuses; no object is changed here.
            StoreError: The disk refuses the copy.
            AdapterError: The files are not an adapter's.
        """
        self._shared.put(config, tensors)
        return self._local.put(config, tensors)

    def files(self, digest: str) -> tuple[bytes, bytes]:
        """Return the config and tensor files of an object, checked against its digest.

        They are fetched if there is no whole copy here, and kept. A disk that refuses to keep them
        is a line in the log: the copy is a matter of speed.

        Raises:
            KeyError: There is no object of this digest, neither here nor there.
            SharedStoreError: No copy here is whole, and the shared store cannot be read, or its
                object is damaged too.
            Damaged: The copy is damaged, and the shared store has no object of this digest.
        """
        damage: Damaged | None = None
        try:
            return self._local.files(digest)
        except KeyError:
            pass
        except Damaged as error:
            damage = error
            _log.warning("mending from %s: %s", self._shared.url, damage.what)
        try:
            config, tensors = self._shared.files(digest)
        except KeyError:
            if damage is not None:
                raise damage from None
            raise
        try:
            self._local.put(config, tensors)
        except StoreError as error:
            _log.warning("no copy of %s is kept: %s", digest, error)
        return config, tensors

    def collect(self, keep: Collection[str]) -> list[str]:
        """Remove every copy whose digest is not among `keep`; the shared store keeps its objects.

        Other servers may use those. For the rest see `Objects.collect`.
        """
        return self._local.collect(keep)

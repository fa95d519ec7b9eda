"""The adapters that a replica has in memory, by digest."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable
from weakref import WeakValueDictionary

from superpose_adapters.adapter import Adapter


class KnownAdapters:
    """Reads an adapter when it is first asked for, and keeps those that were asked for last.

    One that a running row or the weights still use is never read a second time: of one digest there
    is one adapter here. Any thread may ask; what is not in memory it reads, which takes its time.
    """

    def __init__(self, read: Callable[[str], Adapter], most: int = 256) -> None:
        """Read with `read`; keep `most` of them for those to come."""
        self._read = read
        self._most = most
        self._alive: WeakValueDictionary[str, Adapter] = WeakValueDictionary()
        self._latest: OrderedDict[str, Adapter] = OrderedDict()
        self._lock = threading.Lock()

    def __getitem__(self, digest: str) -> Adapter:
        """Return the adapter of a digest; raises whatever reading it does."""
        adapter = self.find(digest)
        if adapter is not None:
            return adapter
        read = self._read(digest)
        with self._lock:
            adapter = self._alive.setdefault(digest, read)
            self._keep(digest, adapter)
        return adapter

    def find(self, digest: str) -> Adapter | None:
        """Return the adapter of a digest if it is in memory."""
        with self._lock:
            adapter = self._alive.get(digest)
            if adapter is not None:
                self._keep(digest, adapter)
        return adapter

    def _keep(self, digest: str, adapter: Adapter) -> None:
        self._latest[digest] = adapter
        self._latest.move_to_end(digest)
        if len(self._latest) > self._most:
            self._latest.popitem(last=False)

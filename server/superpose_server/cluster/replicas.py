"""How replicas are called, whatever carries the calls."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from typing import Any, Protocol

from superpose_server.cluster.answer import Answer


class Replicas(Protocol):
    """Calls to the replicas of one server, by the names of `Replica`'s methods.

    Attributes:
        loop: The event loop that all but `close` is called on.
    """

    loop: asyncio.AbstractEventLoop

    async def all(self, method: str, *arguments: Any, patience: float) -> list[Answer[Any]]:
        """Call every replica that is known; return the answers of those that live to give one.

        Raises:
            Unavailable: None is known, or one has not answered within `patience` seconds.
        """

    async def one(self, method: str, *arguments: Any) -> Any:
        """Call the replica that has least to do.

        Raises:
            Unavailable: It ended meanwhile.
            QueueFull: Too many calls wait for one.
        """

    def stream(self, method: str, *arguments: Any) -> AsyncGenerator[Answer[Any]]:
        """Yield what such a replica does; closing it ends the call there.

        Raises:
            Unavailable, QueueFull: As `one`.
        """

    def close(self) -> None:
        """End what belongs to the server that calls alone."""

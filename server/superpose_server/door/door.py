"""What the server asks of each way in."""

from __future__ import annotations

from typing import Protocol

# What calls get to send their last message after the engine has aborted their rows.
CLOSING_SECONDS = 2


class Door(Protocol):
    """A socket with one wire behind it.

    Attributes:
        address: HOST:PORT that it listens on, known after `open`.
    """

    address: str

    async def open(self) -> None:
        """Listen, and say that everything is served.

        Raises:
            StartupError: The address cannot be listened on.
        """

    async def tell_intact(self, intact: bool) -> None:
        """Say whether text is served: not from damaged weights; all else goes on."""

    async def tell_ending(self) -> None:
        """Say that nothing new is served; what runs goes on."""

    async def close(self) -> None:
        """Close the socket, once running calls have had a moment for their last message."""

"""The limits of one token: calls a minute, and calls at once."""

from __future__ import annotations

import time
from collections.abc import Callable

from superpose_adapters.tokens import Token
from superpose_server.errors import RateLimited

# When one of several calls may have ended.
_SOON_SECONDS = 1.0


class Use:
    """How much of a token's limits is taken; on the event loop alone.

    Calls a minute are a bucket that fills evenly and holds a minute's worth: so many may come at
    once, and the mean is kept.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        """Begin with a token that was not used yet; `clock` is in seconds."""
        self._clock = clock
        self._under_way = 0
        self._left: float | None = None  # In the bucket, when it was looked at last.
        self._looked = 0.0

    def begin(self, token: Token) -> Callable[[], None]:
        """Begin a call with `token`, whose limits may have changed; return what ends it.

        Raises:
            RateLimited: One of the limits is reached; nothing is taken.
        """
        if token.concurrency is not None and self._under_way >= token.concurrency:
            raise RateLimited(
                f"token {token.name} has {self._under_way} calls under way, of "
                f"{token.concurrency} that it may",
                _SOON_SECONDS,
            )
        if token.rate is not None:
            self._take(token.name, token.rate)
        self._under_way += 1
        return self._end

    def _end(self) -> None:
        self._under_way -= 1

    def _take(self, name: str, rate: int) -> None:
        now = self._clock()
        a_second = rate / 60
        filled = float(rate) if self._left is None else self._left
        self._left = min(rate, filled + (now - self._looked) * a_second)
        self._looked = now
        if self._left < 1:
            raise RateLimited(
                f"token {name} may make {rate} calls a minute", (1 - self._left) / a_second
            )
        self._left -= 1

"""The signals that end the server: SIGINT, SIGTERM, and what a terminal sends when it closes.

Before the server is ready they end the process as if they were not handled, so that a shell sees
130 or 143; a server that is ready stops in order and exits with 0. SIGHUP reloads nothing, because
what is read again, tokens and certificates, is so when it changes; on Windows, which has none,
SIGBREAK takes its place.

Imports nothing that takes a moment, so that a signal within the imports has its handler.
"""

from __future__ import annotations

import os
import signal
from typing import NoReturn


def end_at_once() -> None:
    """From now on end the process at a signal, whatever is being imported or waited for."""
    for number in ending_signals():
        signal.signal(number, lambda number, _: die_of(number))


def ending_signals() -> list[signal.Signals]:
    """Return the signals that end the server; SIGHUP is none where it was ignored (nohup)."""
    numbers = [signal.SIGINT, signal.SIGTERM]
    for name in ("SIGHUP", "SIGBREAK"):
        number = getattr(signal, name, None)
        if number is not None and signal.getsignal(number) is not signal.SIG_IGN:
            numbers.append(number)
    return numbers


def take_back_signals() -> None:
    """Put this process's handlers in front again, after a library has put its own there.

    Ray's core does, below Python: it writes a stack trace at a SIGTERM. Runs on the main thread.
    """
    for number in ending_signals():
        signal.signal(number, signal.getsignal(number))
        signal.siginterrupt(number, False)  # As asyncio has it.


def die_of(number: int) -> NoReturn:
    """End the process as the signal does that nobody handles."""
    signal.signal(number, signal.SIG_DFL)
    signal.raise_signal(number)
    # The first process of a container is not killed by its own signals.
    os._exit(128 + number)

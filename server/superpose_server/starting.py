"""A start that a signal can cut short, whatever it is loading or compiling."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
from collections import defaultdict
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any, TypeVar

from superpose_adapters.c_library import c_function
from superpose_server.ending import die_of, ending_signals

T = TypeVar("T")

# Seconds that a start which is given up gets to remove what a compiler was writing.
_PATIENCE = 0.5
_PAUSE = 0.05
_PR_SET_CHILD_SUBREAPER = 36  # of linux/prctl.h
_log = logging.getLogger(__name__)


async def start_or_die(start: Coroutine[Any, Any, T]) -> tuple[T, asyncio.Event]:
    """Return what `start` does, and the event of the first signal after it.

    A signal before that ends the process, and the compilers that the start runs. The start must
    leave the event loop free; its threads are not waited for, so what it writes must be whole at
    any instant.
    """
    loop = asyncio.get_running_loop()
    arrived: list[int] = []
    ending = asyncio.Event()

    def note(number: int) -> None:
        arrived.append(number)
        ending.set()

    for number in ending_signals():
        _hear(loop, number, note)
    starting, waiting = asyncio.ensure_future(start), asyncio.ensure_future(ending.wait())
    await asyncio.wait({starting, waiting}, return_when=asyncio.FIRST_COMPLETED)
    # First: a signal of a terminal ends compilers too, which the start would call their fault.
    if arrived:
        name = signal.Signals(arrived[0]).name
        _log.info("ended by a signal before it was ready signal=%s", name)
        await _give_up(starting)
        die_of(arrived[0])
    waiting.cancel()
    return starting.result(), ending


def _hear(
    loop: asyncio.AbstractEventLoop, number: signal.Signals, note: Callable[[int], None]
) -> None:
    """Call `note` on the loop at a signal."""
    try:
        loop.add_signal_handler(number, note, number)
    except NotImplementedError:
        # Windows. Its loops wake at any signal that has a handler; those of other systems only at
        # one that they know, or else may sleep through it.
        signal.signal(number, lambda number, _: loop.call_soon_threadsafe(note, number))


async def _give_up(starting: asyncio.Future[Any]) -> None:
    """End the compilers that a start runs, and let it remove their files if it does so soon."""
    _adopt_orphans()
    clock = asyncio.get_running_loop().time
    given_up = clock()
    # A compiler may run another at that moment, and the start begin the next one.
    while (_terminate_descendants() and clock() < given_up + 2 * _PATIENCE) or (
        not starting.done() and clock() < given_up + _PATIENCE
    ):
        await asyncio.sleep(_PAUSE)


def _adopt_orphans() -> None:
    """Let what a process below this one leaves behind be below this one still, on Linux."""
    prctl = c_function("prctl")
    if prctl is not None:
        prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def _terminate_descendants() -> bool:
    """Send SIGTERM to all processes below this one; where there is no /proc, to none.

    To those alone: the process group may be that of a script, too.

    Returns:
        Whether there were any.
    """
    children: dict[int, list[int]] = defaultdict(list)
    for file in Path("/proc").glob("[0-9]*/stat"):
        try:
            # "pid (name) state parent ...", and the name may hold anything.
            state, parent = file.read_bytes().rpartition(b")")[2].split()[:2]
        except (OSError, ValueError):
            continue  # It has ended.
        if state != b"Z":
            children[int(parent)].append(int(file.parent.name))
    below = children[os.getpid()]
    for pid in below:  # Grows while it is read.
        below += children.get(pid, [])
    for pid in below:
        try:
            os.kill(pid, signal.SIGTERM)
        except ProcessLookupError:
            continue
    return bool(below)

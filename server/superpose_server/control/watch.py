"""Watching the default mix from an event loop."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator

from superpose_server.control.default_mix import DefaultMix, MixState
from superpose_server.errors import ShuttingDown, WatchBehind

# Changes that a watcher may be behind before it is told to start again.
_MAX_BEHIND = 1024


async def watch(default: DefaultMix, ending: asyncio.Event) -> AsyncGenerator[MixState]:
    """Return the current default mix, then every change of it.

    Raises:
        WatchBehind: Changes would have to be left out.
        ShuttingDown: `ending` is set.
    """
    loop = asyncio.get_running_loop()
    changes: asyncio.Queue[MixState] = asyncio.Queue()

    def put(state: MixState) -> None:
        # One more than allowed ends the watch; what comes after that is not kept.
        if changes.qsize() <= _MAX_BEHIND:
            changes.put_nowait(state)

    def watcher(state: MixState) -> None:
        loop.call_soon_threadsafe(put, state)

    unwatch = default.watch(watcher)
    try:
        # Watching began before the state is read, so no change falls between; what is in both is
        # sent once.
        state = default.state
        yield state
        while True:
            if changes.qsize() > _MAX_BEHIND:
                raise WatchBehind(_MAX_BEHIND)
            change = await _next_change(changes, ending)
            if change is None:
                raise ShuttingDown
            if change.generation > state.generation:
                state = change
                yield state
    finally:
        unwatch()


async def _next_change(changes: asyncio.Queue[MixState], ending: asyncio.Event) -> MixState | None:
    """Return the next change, or None when the server shuts down."""
    change = asyncio.ensure_future(changes.get())
    end = asyncio.ensure_future(ending.wait())
    try:
        await asyncio.wait((change, end), return_when=asyncio.FIRST_COMPLETED)
        return change.result() if change.done() else None
    finally:
        change.cancel()
        end.cancel()

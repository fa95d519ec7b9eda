"""The default mix: what a request that names no mix gets, and the only way to change it.

A change is validated, prepared, made durable in the journal, folded at a step boundary (merged into
the weights), and only then visible: its call returns when every later request gets it. If the fold
fails, the journal goes back to what it held and nothing has changed.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass

from superpose_adapters.mix import BoundMix
from superpose_server.control.journal import Journal, JournalEntry, Record
from superpose_server.engine.executor import Executor
from superpose_server.errors import FailedPrecondition, GenerationMismatch

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class MixState:
    """A mix, and the generation of the default mix at the moment when it was meant.

    The default mix itself, or what a request was bound to.
    """

    generation: int
    mix: BoundMix


Watcher = Callable[[MixState], None]


class DefaultMix:
    """Holds the default mix. `state` may be read by any thread, changes come from one at a time."""

    def __init__(self, journal: Journal, engine: Executor, state: MixState) -> None:
        """Begin with `state`, which the weights already hold."""
        self._journal = journal
        self._engine = engine
        self._watchers: set[Watcher] = set()
        self.state = state

    def watch(self, watcher: Watcher) -> Callable[[], None]:
        """Call `watcher` after each change, on the changing thread; returns how to end that."""
        self._watchers = self._watchers | {watcher}

        def unwatch() -> None:
            self._watchers = self._watchers - {watcher}

        return unwatch

    def check_generation(self, expected: int | None) -> None:
        """Refuse a change that was decided on an older mix.

        Raises:
            GenerationMismatch: `expected` is not the current generation.
        """
        if expected is not None and expected != self.state.generation:
            raise GenerationMismatch(expected, self.state.generation, self.state.mix.digest)

    def change(self, mix: BoundMix) -> MixState:
        """Make `mix` the default mix; the same mix again changes nothing.

        Raises:
            FailedPrecondition: The fold would not be finite, or the journal cannot be written.
            Internal: The fold failed.
        """
        if mix == self.state.mix:
            return self.state
        prepared = self._engine.prepare(mix)
        state = MixState(self.state.generation + 1, mix)
        try:
            self._journal.write(record_of(state))
        except OSError as error:
            _log.error("the journal %s cannot be written: %s", self._journal.path, error)
            raise FailedPrecondition(
                f"the journal cannot be written ({error.strerror or 'see the log'}): free space "
                "or mend --state-dir and try again; nothing has changed",
                "JOURNAL_WRITE_FAILED",
            ) from error
        try:
            self._engine.commit(prepared, state.generation).result()
        except BaseException:
            self._take_back()
            raise
        self.state = state
        _log.info("mix generation=%d digest=%s", state.generation, mix.digest)
        for watcher in self._watchers:
            watcher(state)
        return state

    def _take_back(self) -> None:
        try:
            self._journal.undo()
        except OSError:
            # The mix that is served is right; a restart would come up with the one that failed.
            _log.critical(
                "journal %s holds a mix that is not served and could not be taken back: "
                "set the mix again before a restart",
                self._journal.path,
                exc_info=True,
            )


def record_of(state: MixState) -> Record:
    """Return what the journal keeps of `state`."""
    return Record(
        state.generation,
        state.mix.base_digest,
        state.mix.digest,
        tuple(JournalEntry(e.domain, e.adapter.digest, e.weight) for e in state.mix.entries),
    )

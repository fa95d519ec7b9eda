"""Names for mixes: `qa` for math=1,medicine=0.5, kept on disk beside the journal.

A name stands for weights of domains, not for adapters: what these domains name is found out when a
request is bound, as if it had spelled the mix out. So a name outlives an adapter that is replaced,
and one that is deleted; requests for it are then refused until its domains are all there again.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from superpose_adapters.mix import Mix
from superpose_adapters.mix_syntax import check_name, mix_from_json
from superpose_server.control.checked_file import CheckedFile
from superpose_server.errors import FailedPrecondition, NotFound

MAX_NAMED_MIXES = 1000
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class NamedMix:
    """A mix of domains under its name."""

    name: str
    mix: Mix


class NamedMixes:
    """The named mixes of one state folder. Any thread may read; one at a time may change them."""

    def __init__(self, folder: Path, most: int = MAX_NAMED_MIXES) -> None:
        """Read those of `folder`, which exists; it may hold `most` of them.

        Raises:
            FileDamaged: The file is not whole, or of another format.
        """
        self._file = CheckedFile(
            folder / "named_mixes.json", "file of named mixes", "start without named mixes"
        )
        self._most = most
        self._mixes: Mapping[str, Mix] = self._read()

    def all(self) -> list[NamedMix]:
        """Return all of them, in ascending order of name."""
        return [NamedMix(name, mix) for name, mix in sorted(self._mixes.items())]

    def find(self, name: str) -> Mix | None:
        """Return the mix that `name` stands for, or None."""
        return self._mixes.get(name)

    def put(self, named: NamedMix) -> None:
        """Let a name stand for a mix, in place of what it stood for; durable when it returns.

        Raises:
            FailedPrecondition: There are as many as may be, or the disk refuses; nothing changes.
        """
        if self.find(named.name) == named.mix:
            return
        mixes = {**self._mixes, named.name: named.mix}
        if len(mixes) > self._most:
            raise FailedPrecondition(
                f"{self._most} mixes have names already, which is the most: take another name "
                "away first",
                "TOO_MANY_NAMED_MIXES",
            )
        self._write(mixes)
        self._mixes = mixes  # Readers hold the old mapping or the new one.

    @contextmanager
    def replacing(self, mixes: Mapping[str, Mix]) -> Iterator[None]:
        """Let `mixes` be all there are once the block is left: durable within it, seen after it.

        If it raises, they are taken back, and those from before are there still.

        Raises:
            FailedPrecondition: There are more than may be, or the disk refuses; nothing changes.
        """
        if mixes == self._mixes:
            yield
            return
        if len(mixes) > self._most:
            raise FailedPrecondition(
                f"{len(mixes)} mixes are to have names, and {self._most} is the most: name fewer",
                "TOO_MANY_NAMED_MIXES",
            )
        self._write(mixes)
        try:
            yield
        except BaseException:
            self._take_back()
            raise
        self._mixes = dict(mixes)

    def remove(self, name: str) -> None:
        """Take a name away; rows that were bound by it keep their mix.

        Raises:
            NotFound: No mix has this name.
            FailedPrecondition: The disk refuses; nothing changes.
        """
        if name not in self._mixes:
            names = ", ".join(sorted(self._mixes)[:20]) or "none"
            raise NotFound(
                f"no mix is named {name[:80]!r} (named: {names})",
                "NAMED_MIX_NOT_FOUND",
                metadata={"name": name[:80]},
            )
        mixes = {other: mix for other, mix in self._mixes.items() if other != name}
        self._write(mixes)
        self._mixes = mixes

    def _read(self) -> dict[str, Mix]:
        body = self._file.read()
        if body is None:
            return {}
        try:
            return {
                check_name(name): Mix.of(mix_from_json(weights)) for name, weights in body.items()
            }
        except (ValueError, AttributeError) as error:
            raise self._file.damaged(f"it is not a whole file of named mixes ({error})") from error

    def _write(self, mixes: Mapping[str, Mix]) -> None:
        try:
            self._file.write({name: dict(mix.entries) for name, mix in mixes.items()})
        except OSError as error:
            _log.error("%s cannot be written: %s", self._file.path, error)
            raise FailedPrecondition(
                f"the names of mixes cannot be written ({error.strerror or 'see the log'}): free "
                "space or mend --state-dir and try again; nothing has changed",
                "NAMED_MIXES_WRITE_FAILED",
            ) from error

    def _take_back(self) -> None:
        try:
            self._file.undo()
        except OSError:
            # The names that are served are right; a restart would come up with the others.
            _log.critical(
                "%s holds names of mixes that are not served and could not be taken back: name "
                "the mixes again before a restart",
                self._file.path,
                exc_info=True,
            )

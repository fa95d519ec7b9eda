"""What a replica answers a call with, so that an error is a value: Ray would log it and wrap it."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Generic, TypeVar

from superpose_server.errors import Internal, ServerError

T = TypeVar("T")
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Answer(Generic[T]):
    """What came of a call to one replica.

    Attributes:
        replica: Who answers.
        value: What was asked for, unless there is an error.
        error: What keeps the replica from it.
        unfit: Whether the replica is at fault, and will begin anew.
    """

    replica: str
    value: T | None = None
    error: ServerError | None = None
    unfit: bool = False

    def get(self) -> T:
        """Return the value, or raise what came in its place."""
        if self.error is not None:
            raise self.error
        return self.value  # type: ignore[return-value]  # None where T is.


def told(error: Exception) -> ServerError:
    """Return what may be told of an error; what is no error of ours is for the log alone."""
    if isinstance(error, ServerError):
        return error
    _log.exception("a call failed", exc_info=error)
    return Internal("a replica failed, its log says how: try again", "REPLICA_FAILED")

"""Clients that go away in the midst of an answer, in the log: an event, and no fault of ours.

gRPC writes an error with a trace for each, if it was sending when the client went.
"""

from __future__ import annotations

import logging

_log = logging.getLogger(__name__)


class _Departures(logging.Filter):
    def filter(self, record: logging.LogRecord) -> bool:
        kind = record.exc_info[0] if record.exc_info else None
        if kind is None or kind.__name__ != "ExecuteBatchError":
            return True
        _log.info("a client has gone in the midst of an answer")
        return False


_DEPARTURES = _Departures()


def calm_departures() -> None:
    """Let gRPC's log speak of them as an event; twice is as good as once."""
    logging.getLogger("grpc._cython.cygrpc").addFilter(_DEPARTURES)

"""The attempts of one call: what is sent again, after which pause, and what is not.

Two ends of a call may be followed by another attempt: UNAVAILABLE, after a pause that grows and is
drawn at random, so that clients that were cut off together do not come back together; and
RESOURCE_EXHAUSTED where the server says how long to wait (RetryInfo). Never after the first part of
a stream, never a call that would mean something else twice (`services.may_be_repeated`), and never
beyond the call's own timeout. Of several servers each is asked once before a pause.

gRPC has retries too, which a service config turns on by method. They cannot tell a change with an
`expected_generation` from one without, do not read RetryInfo, would repeat a message that was too
large, which is RESOURCE_EXHAUSTED as well, and do not say how often a call was sent, which explains
the end of a change that was cut off. So these are ours. What gRPC knows to have reached no server
it sends again by itself.
"""

import random
import time
from typing import Any

import grpc

from superpose_client.call import Call
from superpose_client.connection import Connections
from superpose_client.errors import (
    CallError,
    GenerationMismatchError,
    ResourceExhaustedError,
    UnavailableError,
)
from superpose_client.services import SERVICES, may_be_repeated

FIRST_PAUSE = 0.1  # seconds, at most; it doubles up to the longest
LONGEST_PAUSE = 5.0
LONGEST_HINT = 30.0  # what the server may ask for beyond that; longer waits are the caller's


class Attempts:
    """The attempts of one call, which share its timeout."""

    def __init__(self, connections: Connections, call: Call[Any]) -> None:
        """Send nothing yet.

        Raises:
            AddressError: The call is about one server, and there are several.
        """
        given = (call.timeout, connections.timeout, call.usual_timeout)
        seconds = next(timeout for timeout in given if timeout is not None)
        service, method = call.method.split(".")
        self._may_go_on = may_be_repeated(SERVICES[service].method(method), call.request)
        self._connections = connections.for_call(call)
        self._retries = connections.retries
        self._call = call
        self._deadline = time.monotonic() + seconds
        self._sent = 0
        self._pauses = 0
        self._cut_off = False

    def start(self) -> Any:
        """Send the call, or send it again, and return what the stub does.

        Raises:
            ClientClosedError: The client was closed.
        """
        self._connection = self._connections[self._sent % len(self._connections)]
        self._sent += 1
        return self._connection.start(self._call, self._seconds_left())

    def answered(self) -> None:
        """Hear that a part of the answer has arrived: from now on nothing is sent again."""
        self._may_go_on = False

    def interrupted(self) -> None:
        """Hear that an exception from elsewhere, a signal handler's, ended the wait for a part."""
        self._connection.renew()

    def pause_after(self, error: grpc.RpcError) -> float:
        """Return the seconds to wait between an attempt that ended with `error` and the next.

        Raises:
            CallError: There is no next one.
        """
        failed = self._connection.failed(error)
        pause = self._pause_after(failed) if self._may_go_on else None
        if pause is None or pause >= self._seconds_left():
            if self._cut_off and isinstance(failed, GenerationMismatchError):
                failed.add(
                    "this call was cut off and sent again, so the change may be its own: look at "
                    "the mix before you repeat it"
                )
            raise failed from error
        # With a reason it is the server that speaks, and has done nothing.
        self._cut_off |= isinstance(failed, UnavailableError) and not failed.reason
        return pause

    def _pause_after(self, failed: CallError) -> float | None:
        hint = 0.0
        if isinstance(failed, ResourceExhaustedError) and failed.retry_after_seconds is not None:
            hint = failed.retry_after_seconds
        elif not isinstance(failed, UnavailableError):
            return None
        if self._sent % len(self._connections):
            return 0.0
        if hint > LONGEST_HINT or self._pauses == self._retries:
            return None
        growing = min(FIRST_PAUSE * 2.0**self._pauses, LONGEST_PAUSE)
        self._pauses += 1
        # Not before the hint, and not all at once after it.
        return hint + growing * random.uniform(0.5, 1)

    def _seconds_left(self) -> float:
        return max(0.0, self._deadline - time.monotonic())

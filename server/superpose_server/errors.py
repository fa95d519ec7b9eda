"""What can go wrong, in the server's own words; every door turns it into those of its wire.

ServerError
├── InvalidArgument      the request is wrong whatever the state of the server
├── Unauthenticated      there is no token, or none that is good
├── PermissionDenied     the token is good, but not for this
├── NotFound             a name that stands for nothing, or a domain not in the default mix
├── AlreadyExists        a domain that is in the mix, or a name that is taken
├── FailedPrecondition   the state must be changed by hand before a retry can succeed
│   └── OutputNotFinite  ... as the weights of this mix
├── GenerationMismatch   somebody else changed the default mix first
├── QueueFull            retry after a while
│   ├── FitRunning       ... when another fit has ended
│   └── RateLimited      ... when the caller's token may be used again
├── WatchBehind          watch again
├── ShuttingDown         retry elsewhere
├── Unavailable          retry: what was to run it is gone, and another will be there
│   ├── AdapterAway      ... as an adapter that a replica cannot read now
│   └── ReplicaUnfit     ... as a replica that begins anew
├── DataLoss             the weights fail their hash, or a fold could not be undone
└── Internal             a fault of ours whose outcome is known and safe to tell
"""

from __future__ import annotations

from typing import Any

from superpose_adapters.one_line import escaped


class StartupError(Exception):
    """The server cannot start; one line that names the thing and the remedy."""


class BeyondRepair(Exception):
    """What the server holds in memory is damaged, and only another start mends it; one line."""


class SelfCheckError(StartupError):
    """A base does not mean here what it means in transformers; the message continues "base X: "."""


class ServerError(Exception):
    """Base of all errors that a client is told of.

    Attributes:
        message: One line that names the thing and the remedy.
        reason: UPPER_SNAKE, for programs; stable.
        field: The request field at fault, if one is.
        metadata: Further facts for programs, {name: value}.
    """

    def __init__(
        self,
        message: str,
        reason: str,
        *,
        field: str | None = None,
        metadata: dict[str, str] | None = None,
    ) -> None:
        """Hold the one line and its machine-readable reason."""
        message = escaped(message)  # Most name a thing as the client wrote it.
        super().__init__(message)
        self.message = message
        self.reason = reason
        self.field = field
        self.metadata = metadata or {}

    def __reduce__(self) -> tuple[Any, ...]:
        """Go to another process as it is, whatever arguments its kind is made of."""
        return _made_again, (type(self), self.args, self.__dict__.copy())


def _made_again(
    kind: type[ServerError], args: tuple[Any, ...], state: dict[str, Any]
) -> ServerError:
    error = kind.__new__(kind)
    Exception.__init__(error, *args)
    error.__dict__.update(state)
    return error


class InvalidArgument(ServerError):
    """The request is wrong whatever the state of the server."""


class Unauthenticated(ServerError):
    """Nobody knows who calls: the token is missing, unknown or expired."""


class PermissionDenied(ServerError):
    """Who calls may not do this."""


class NotFound(ServerError):
    """The thing that the request names is not there."""


class AlreadyExists(ServerError):
    """The thing that the request would make is there already."""


class FailedPrecondition(ServerError):
    """The state of the server must be changed by hand before a retry can succeed."""


class OutputNotFinite(FailedPrecondition):
    """A model's logits under a mix are no numbers that can be chosen from."""

    def __init__(self, mix: str = "this mix", *, row: int | None = None) -> None:
        """Say so of `mix`.

        Args:
            mix: What the request calls it.
            row: Where several rows were run at once, which of them showed it.
        """
        super().__init__(
            f"the model's output is not finite under {mix}: use smaller weights",
            "OUTPUT_NOT_FINITE",
        )
        self.row = row


class GenerationMismatch(ServerError):
    """The default mix is not at the generation that the caller expected."""

    def __init__(self, expected: int, generation: int, digest: str) -> None:
        """Name what was expected and what is there, so that a caller can tell what landed."""
        super().__init__(
            f"generation {expected} was expected, but the default mix is at {generation}: "
            "read it again and decide anew",
            "GENERATION_MISMATCH",
            metadata={"generation": str(generation), "digest": digest},
        )


class QueueFull(ServerError):
    """No more requests can wait; `retry_after_seconds` says when to try again."""

    def __init__(self, limit: int, retry_after_seconds: float) -> None:
        """Name the bound that was met."""
        super().__init__(
            f"{limit} requests are waiting already: retry in {retry_after_seconds:g} s",
            "QUEUE_FULL",
        )
        self.retry_after_seconds = retry_after_seconds


class FitRunning(QueueFull):
    """A fit takes the engine for many scores, so that one runs at a time."""

    def __init__(self, retry_after_seconds: float) -> None:
        """Say so."""
        ServerError.__init__(
            self,
            "a fit is running already, and one runs at a time: retry when it has ended",
            "FIT_RUNNING",
        )
        self.retry_after_seconds = retry_after_seconds


class RateLimited(QueueFull):
    """A token has been used as much as it may be."""

    def __init__(self, message: str, retry_after_seconds: float) -> None:
        """Say of which limit, in a line that goes on with when to try again."""
        ServerError.__init__(
            self, f"{message}: retry in {retry_after_seconds:.3g} s", "RATE_LIMITED"
        )
        self.retry_after_seconds = retry_after_seconds


class WatchBehind(ServerError):
    """A watcher reads so slowly that changes would have to be left out."""

    def __init__(self, limit: int) -> None:
        """Name the bound that was met."""
        super().__init__(
            f"this watch is {limit} changes behind: watch again to begin with the current mix",
            "WATCH_BEHIND",
        )


class ShuttingDown(ServerError):
    """The server takes no more requests."""

    def __init__(self) -> None:
        """Say so."""
        super().__init__("the server is shutting down: retry elsewhere", "SHUTTING_DOWN")


class Unavailable(ServerError):
    """What was to answer is not there, or not any more; nothing stands of the call."""


class AdapterAway(Unavailable):
    """A replica cannot read an adapter, which may be its store's fault or its own.

    Attributes:
        why: For the log alone.
    """

    def __init__(self, why: str) -> None:
        """Hold why."""
        super().__init__("a replica cannot read an adapter now: try again", "ADAPTER_AWAY")
        self.why = why


class ReplicaUnfit(Unavailable):
    """A replica cannot do what others can, and begins anew.

    Attributes:
        why: For the log alone.
    """

    def __init__(self, why: str) -> None:
        """Hold why."""
        super().__init__("a replica is not fit and begins anew: try again", "REPLICA_UNFIT")
        self.why = why


class DataLoss(ServerError):
    """The resident weights or the kept base fail their hash."""


class Internal(ServerError):
    """A fault of ours whose outcome is known: what stands is told in the message."""

"""Whose call this is: told by a door, asked where mixes are bound and changes are recorded.

It goes with the call itself, through whatever tasks and threads it takes, so that no layer between
has to hand it on, and none can forget to.
"""

from __future__ import annotations

from contextvars import ContextVar
from dataclasses import dataclass

from superpose_adapters.tokens import ANONYMOUS


@dataclass(frozen=True)
class Caller:
    """Who calls.

    Attributes:
        name: Of the token, or `anonymous`.
        peer: Where the call came from, as its door writes that; "" if nobody called.
        domains: What its mixes may hold; None: any domain.
    """

    name: str = ANONYMOUS
    peer: str = ""
    domains: frozenset[str] | None = None


_NOBODY = Caller()
_caller: ContextVar[Caller] = ContextVar("caller", default=_NOBODY)


def caller() -> Caller:
    """Return whose call runs."""
    return _caller.get()


def set_caller(calling: Caller) -> None:
    """Say whose call runs, to all that its task does from now on."""
    _caller.set(calling)

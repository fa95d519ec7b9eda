"""What other libraries raise, as a part of a line of ours."""

from __future__ import annotations

# Characters of what another library says, as a part of a line of ours.
_LONGEST = 300


def one_line(error: BaseException, longest: int = _LONGEST) -> str:
    """Return what an error says, in one line of `longest` characters at most, and a few dots."""
    line = " ".join(str(error).split()) or type(error).__name__
    return line if len(line) <= longest else f"{line[:longest]} ..."


def with_kind(error: BaseException) -> str:
    """Return the same behind the name of its class, for errors of other libraries."""
    return one_line(Exception(f"{type(error).__name__}: {error}"))

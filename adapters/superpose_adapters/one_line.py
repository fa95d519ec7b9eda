"""One line: what other libraries raise, and what strangers write, as a part of a line of ours."""

from __future__ import annotations

# Characters of what another library says, as a part of a line of ours.
_LONGEST = 300


def one_line(error: BaseException, longest: int = _LONGEST) -> str:
    """Return what an error says, in one line of `longest` characters at most, and a few dots."""
    line = " ".join(str(error).split()) or type(error).__name__
    return line if len(line) <= longest else f"{line[:longest]} ..."


def escaped(text: str) -> str:
    """Return a text of which a part is a stranger's, with what is not printable as escapes.

    So it is one line, and tells a terminal or a log nothing else than it says.
    """
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def with_kind(error: BaseException) -> str:
    """Return the same behind the name of its class, for errors of other libraries."""
    return one_line(Exception(f"{type(error).__name__}: {error}"))

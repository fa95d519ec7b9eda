"""What options of a merge method are, and how a command line writes them: density=0.2, seed=3.

Both commands that merge read them here; it needs no torch, since one of them has none.
"""

from __future__ import annotations

from collections.abc import Iterable

Option = int | float | bool | str
"""What an option of a method may be, as JSON has it."""

LARGEST_WHOLE = 2**53 - 1
"""Of a whole number: from here on doubles, which the wire has for all numbers, leave some out."""


def parse_options(texts: Iterable[str]) -> dict[str, Option]:
    """Return options by name: a number where the value is one, a truth value, else the word.

    Raises:
        ValueError: One is not written as NAME=VALUE, a name comes twice, or a number is larger than
            the wire has; one line.
    """
    options: dict[str, Option] = {}
    for text in texts:
        name, equals, value = text.partition("=")
        if not (name and equals and value):
            raise ValueError(f"{text[:80]!r} is no NAME=VALUE, as in density=0.2")
        if name in options:
            raise ValueError(f"{name[:80]!r} is given twice: give it once")
        read = _value(value)
        if isinstance(read, int) and abs(read) > LARGEST_WHOLE:
            raise ValueError(
                f"{name[:80]!r} is beyond 2^53, from where on numbers are not exact: use less"
            )
        options[name] = read
    return options


def _value(text: str) -> Option:
    if text in ("true", "false"):
        return text == "true"
    for number in (int, float):
        try:
            return number(text)
        except ValueError:
            pass
    return text

"""How options of a merge method are written on a command line: density=0.2, seed=3, signs=true.

Both commands that merge read them here; it needs no torch, since one of them has none.
"""

from __future__ import annotations

from collections.abc import Iterable


def parse_options(texts: Iterable[str]) -> dict[str, int | float | bool | str]:
    """Return options by name: a number where the value is one, a truth value, else the word.

    Raises:
        ValueError: One is not written as NAME=VALUE, or a name comes twice; one line.
    """
    options: dict[str, int | float | bool | str] = {}
    for text in texts:
        name, equals, value = text.partition("=")
        if not (name and equals and value):
            raise ValueError(f"{text[:80]!r} is no NAME=VALUE, as in density=0.2")
        if name in options:
            raise ValueError(f"{name[:80]!r} is given twice: give it once")
        options[name] = option_value(value)
    return options


def option_value(text: str) -> int | float | bool | str:
    """Return what a value means: a number, a truth value, or else the word."""
    if text in ("true", "false"):
        return text == "true"
    for number in (int, float):
        try:
            return number(text)
        except ValueError:
            pass
    return text

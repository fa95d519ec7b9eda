"""JSON of strangers: objects that mean one thing, and numbers that are numbers.

Python's reader takes NaN, which is no JSON, and keeps the last of two values of one name, where
another reader keeps the first.
"""

from __future__ import annotations

import json
from collections import Counter
from typing import Any, NoReturn

# Objects and lists within one another; PEFT's files and safetensors headers have four.
MAX_DEPTH = 64


class StrictJsonError(ValueError):
    """A text is no such object; the message goes on after the name of what was read."""


def read_object(text: bytes) -> dict[str, Any]:
    """Return the object that `text` is.

    Raises:
        StrictJsonError: It is not JSON, no object, nested deeper than `MAX_DEPTH`, names something
            twice, or holds NaN, Infinity or half a character.
    """
    try:
        value = json.loads(text.decode(), object_pairs_hook=_unique, parse_constant=_refuse)
    except StrictJsonError:
        raise
    # A text that is nested too deeply is a RecursionError.
    except (ValueError, RecursionError) as error:
        raise StrictJsonError(f"is not JSON ({type(error).__name__})") from error
    if not isinstance(value, dict):
        raise StrictJsonError("is not a JSON object")
    if text.count(b"[") + text.count(b"{") > MAX_DEPTH:
        _check_depth(value)
    if b"\\u" in text:
        _check_characters(value)
    return value


def shorten(value: Any) -> str:
    """Return `value` for a message, as JSON: one line, at most 80 characters."""
    text = json.dumps(value, default=list)
    return text if len(text) <= 80 else text[:77] + "..."


def _check_depth(value: Any) -> None:
    """Refuse what Python can read and, from deeper in its stack, no longer write."""
    level = [value]
    for _ in range(MAX_DEPTH):
        level = [
            inner
            for outer in level
            for inner in (outer.values() if isinstance(outer, dict) else outer)
            if isinstance(inner, dict | list)
        ]
        if not level:
            return
    raise StrictJsonError(f"is nested more than {MAX_DEPTH} deep")


def _check_characters(value: Any) -> None:
    """Refuse half of a pair of escapes, of which no text in UTF-8 can be made."""
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        raise StrictJsonError("holds half a character: escape both halves, or none") from error


def _unique(items: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(items)
    if len(result) < len(items):
        twice = Counter(name for name, _ in items).most_common(1)[0][0]
        raise StrictJsonError(f"names {shorten(twice)} twice: name each field once")
    return result


def _refuse(literal: str) -> NoReturn:
    raise StrictJsonError(f"holds {literal}: use finite numbers")

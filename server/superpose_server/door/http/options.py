"""The options of a merge method: numbers, truth values and words by name."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from superpose_adapters.option_syntax import Option
from superpose_server.door.http.fields import NUMBER, Kind, refuse


class _Options:
    schema: Mapping[str, Any] = {
        "type": "object",
        "additionalProperties": {"type": ["number", "boolean", "string"]},
    }

    def read(self, value: Any, at: str) -> dict[str, Option]:
        if not isinstance(value, dict):
            refuse(value, at, "an object")
        return {name: _option(each, f"{at}.{name[:80]}") for name, each in value.items()}


def _option(value: Any, at: str) -> Option:
    if isinstance(value, bool | str):
        return value
    if not isinstance(value, int | float):
        refuse(value, at, "a number, true or false, or a text")
    number: float = NUMBER.read(value, at)
    return number


OPTIONS: Kind = _Options()

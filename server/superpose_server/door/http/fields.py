"""What a JSON body may hold: one table that reads it, refuses the rest by name, and describes it.

Nothing that could change an answer is passed over in silence: a field is read, or may only hold
its one value (`Only`), or is known to change nothing (`IGNORED`), or the request is refused.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn, Protocol

from superpose_adapters.strict_json import shorten
from superpose_server.errors import InvalidArgument

Asked = Mapping[str, Any]
"""The fields that a body holds, read; what is absent or null is not in it."""


class Kind(Protocol):
    """What a value must be.

    Attributes:
        schema: As JSON Schema has it.
    """

    @property
    def schema(self) -> Mapping[str, Any]:
        """See above."""

    def read(self, value: Any, at: str) -> Any:
        """Return what `value`, found at the path `at`, means.

        Raises:
            InvalidArgument: Nothing; says what is to be sent.
        """


@dataclass(frozen=True)
class Plain:
    """A value that is taken as it is."""

    words: str
    schema: Mapping[str, Any]
    accepts: Callable[[Any], bool]

    def read(self, value: Any, at: str) -> Any:
        """See `Kind`."""
        if not self.accepts(value):
            refuse(value, at, self.words)
        return value


class _Number:
    schema: Mapping[str, Any] = {"type": "number"}

    def read(self, value: Any, at: str) -> float:
        if isinstance(value, bool) or not isinstance(value, int | float):
            refuse(value, at, "a number")
        try:
            number = float(value)
        except OverflowError:
            number = math.inf
        if not math.isfinite(number):
            refuse(value, at, "a number of less than 309 digits")
        return number


def _is_integer(value: Any) -> bool:
    return type(value) is int  # Neither a truth value nor 1.0.


TEXT = Plain("a text", {"type": "string"}, lambda value: isinstance(value, str))
FLAG = Plain("true or false", {"type": "boolean"}, lambda value: isinstance(value, bool))
NUMBER: Kind = _Number()
ANYTHING = Plain("anything", {}, lambda value: True)


def integer(least: int, most: int) -> Plain:
    """Return the kind of integers in a range."""
    return Plain(
        f"an integer from {least} to {most}",
        {"type": "integer", "minimum": least, "maximum": most},
        lambda value: _is_integer(value) and least <= value <= most,
    )


class _Switch:
    schema: Mapping[str, Any] = {"type": "boolean"}

    def read(self, value: Any, at: str) -> bool:
        if value not in ("true", "false"):
            refuse(value, at, "true or false")
        return bool(value == "true")


class _Digits:
    schema: Mapping[str, Any] = {"type": "integer", "minimum": 0, "maximum": 2**32 - 1}

    def read(self, value: Any, at: str) -> int:
        if not re.fullmatch("[0-9]{1,10}", value):
            refuse(value, at, "a whole number")
        number: int = COUNT.read(int(value), at)
        return number


DIGITS: Kind = _Digits()
"""A number as a query writes it, which knows only texts."""
SWITCH: Kind = _Switch()
"""A truth value as a query writes it, which knows only texts."""
COUNT = integer(0, 2**32 - 1)
TOKEN_IDS = Plain(
    "a list of token ids, integers from 0 to 4294967295",  # As wide as gRPC's.
    {"type": "array", "items": COUNT.schema},
    lambda value: isinstance(value, list) and all(map(COUNT.accepts, value)),
)


@dataclass(frozen=True)
class Only:
    """A value that means what is done anyway; OpenAI has others, which are not served here."""

    values: tuple[Any, ...]

    @property
    def schema(self) -> Mapping[str, Any]:
        """See `Kind`."""
        return {"enum": list(self.values)}

    def read(self, value: Any, at: str) -> Any:
        """See `Kind`."""
        # True equals 1 to Python, but not to JSON.
        if not any(value == only and type(value) is type(only) for only in self.values):
            raise InvalidArgument(
                f"{at} is {shorten(value)}, which is not served here: "
                f"leave it out, or send {' or '.join(map(shorten, self.values))}",
                "UNSUPPORTED_FIELD",
                field=at,
            )
        return value


@dataclass(frozen=True)
class OneOf:
    """One of some words."""

    words: tuple[str, ...]

    @property
    def schema(self) -> Mapping[str, Any]:
        """See `Kind`."""
        return {"enum": list(self.words)}

    def read(self, value: Any, at: str) -> Any:
        """See `Kind`."""
        if value not in self.words:
            refuse(value, at, "one of " + ", ".join(self.words))
        return value


@dataclass(frozen=True)
class ListOf:
    """A list; with `single` one value may stand for a list of it."""

    kind: Kind
    single: bool = False

    @property
    def schema(self) -> Mapping[str, Any]:
        """See `Kind`."""
        several = {"type": "array", "items": self.kind.schema}
        return {"anyOf": [self.kind.schema, several]} if self.single else several

    def read(self, value: Any, at: str) -> list[Any]:
        """See `Kind`."""
        if not isinstance(value, list):
            if not self.single:
                refuse(value, at, "a list")
            return [self.kind.read(value, at)]
        return [self.kind.read(each, f"{at}[{index}]") for index, each in enumerate(value)]


@dataclass(frozen=True)
class Field:
    """A field of a body.

    Attributes:
        name: Its name.
        kind: What it must be; None: whatever it is, it changes nothing, and is not read.
        about: What it does, for people.
        required: Whether it must be there.
    """

    name: str
    kind: Kind | None
    about: str = ""
    required: bool = False


@dataclass(frozen=True)
class Form:
    """An object of fields.

    Attributes:
        name: What the document calls it.
        fields: All that it may hold.
    """

    name: str
    fields: tuple[Field, ...]

    @property
    def schema(self) -> Mapping[str, Any]:
        """See `Kind`."""
        return {
            "type": "object",
            "properties": {
                field.name: {
                    **({} if field.kind is None else field.kind.schema),
                    **({"description": field.about} if field.about else {}),
                }
                for field in self.fields
            },
            "required": [field.name for field in self.fields if field.required],
            "additionalProperties": False,
        }

    def read(self, value: Any, at: str = "") -> Asked:
        """See `Kind`; the body itself is at "".

        Raises:
            InvalidArgument: A field that is none of these, is missing, or holds what it may not.
        """
        if not isinstance(value, dict):
            refuse(value, at or "the body", "an object")
        prefix = f"{at}." if at else ""
        fields = {field.name: field for field in self.fields}
        asked: dict[str, Any] = {}
        for name, each in value.items():
            field = fields.get(name)
            if each is None:
                continue  # Clients send null for what they leave open, whatever it is called.
            if field is None:
                shown = f"{prefix}{name[:80]}"
                raise InvalidArgument(
                    f"{shown} is no field of this request, and might change the answer: "
                    "leave it out",
                    "UNKNOWN_FIELD",
                    field=shown,
                )
            if field.kind is not None:
                asked[name] = field.kind.read(each, f"{prefix}{name}")
        for field in self.fields:
            if field.required and field.name not in asked:
                raise InvalidArgument(
                    f"{prefix}{field.name} is missing: send it",
                    "MISSING_FIELD",
                    field=f"{prefix}{field.name}",
                )
        return asked


def ignored(*names: str) -> tuple[Field, ...]:
    """Return fields that change nothing."""
    return tuple(Field(name, None, "Ignored.") for name in names)


def only(values: Mapping[str, Sequence[Any]]) -> tuple[Field, ...]:
    """Return fields that may hold no other values than these, {name: values}."""
    return tuple(Field(name, Only(tuple(each))) for name, each in values.items())


def refuse(value: Any, at: str, words: str) -> NoReturn:
    """Refuse what is found at `at`; `words` say what is to be sent.

    Raises:
        InvalidArgument: Always.
    """
    raise InvalidArgument(f"{at} is {shorten(value)}: send {words}", "INVALID_FIELD", field=at)
